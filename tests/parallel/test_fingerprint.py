"""The auditor's hash of a tensor: any one bit, and any two elements exchanged, change it."""

from __future__ import annotations

import itertools

import pytest
import torch

from megalign.parallel.audit.held import fingerprint


def of(tensor: torch.Tensor) -> tuple[int, int]:
    one, two = fingerprint(tensor)
    return int(one), int(two)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8, torch.int64])
@pytest.mark.parametrize("size", [1, 5, 511, 512, 513, 1400])
def test_every_element_counts(size: int, dtype: torch.dtype):
    tensor = (torch.arange(size) % 97 + 1).to(dtype)
    before = of(tensor)
    assert before == of(tensor.clone())
    for at in range(size):
        kept = tensor[at].clone()
        tensor[at] += 1
        assert of(tensor) != before, at
        tensor[at] = kept


def test_the_last_bit_counts():
    tensor = torch.linspace(-1, 1, 700)
    before = of(tensor)
    for at in (0, 511, 512, 699):
        changed = tensor.clone()
        changed.view(torch.int32)[at] ^= 1
        assert of(changed) != before


def test_places_count():
    """Within a row of the table of 512, within a column, in the rest, and across."""
    tensor = torch.randn(3 * 512 + 40, generator=torch.Generator().manual_seed(0))
    before = of(tensor)
    for one, two in itertools.combinations((0, 1, 511, 512, 513, 1024, 1536, 1537, 1575), 2):
        changed = tensor.clone()
        changed[[one, two]] = tensor[[two, one]]
        assert of(changed) != before, (one, two)


def test_shapes_and_strides_do_not():
    tensor = torch.randn(40, 50)
    assert of(tensor) == of(tensor.reshape(-1)) == of(tensor.t().contiguous().t())
    assert of(torch.empty(0)) == of(torch.empty(0, 3))

"""Sums of log-probabilities by document, by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megalign.batch import collate
from megalign.data.rows import Example
from megalign.models.sequences import sequence_logprobs, sequence_tokens

ALONE: Any = SimpleNamespace(context=SimpleNamespace(size=1, rank=0, group=None))


def document(length: int, scored: tuple[int, ...]) -> Example:
    return Example(np.arange(1, length + 1, dtype=np.int32), np.isin(np.arange(length), scored))


@pytest.mark.parametrize("pad_to", [None, 24])
def test_each_document_gets_its_own_scored_tokens(pad_to: int | None):
    """Documents of 5, 3 and 4 tokens with 2, 1 and 3 scored ones, padding between and behind."""
    packs = [[document(5, (3, 4)), document(3, (2,))], [document(4, (1, 2, 3))]]
    batch = collate(packs, sequence_length=12, pad_id=0, document_multiple=2, pad_to=pad_to)
    logprobs = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0, -32.0], requires_grad=True)
    output = torch.stack([logprobs, torch.ones(6)])
    found = sequence_logprobs(output, batch, ALONE)
    assert found.tolist() == [-3.0, -4.0, -56.0] and found.dtype == torch.float32
    assert sequence_tokens(batch).tolist() == [2, 1, 3]
    (found * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert logprobs.grad is not None and logprobs.grad.tolist() == [1, 1, 10, 100, 100, 100]


def test_a_batch_of_padding_and_a_document_without_scored_tokens():
    empty = collate([[], []], sequence_length=8, pad_id=0)
    assert sequence_logprobs(torch.zeros(2, 0), empty, ALONE).tolist() == [] == sequence_tokens(empty).tolist()
    silent = collate([[document(4, ()), document(3, (1,))]], sequence_length=8, pad_id=0)
    assert sequence_logprobs(torch.full((2, 1), -5.0), silent, ALONE).tolist() == [0.0, -5.0]
    assert sequence_tokens(silent).tolist() == [1, 1], "a divisor"

"""The quantisation kernels, interpreted: every byte and scale equals the reference's."""

from __future__ import annotations

import math
from collections.abc import Callable

import ahead
import pytest
import torch
from checks import assert_equal, check_quantise
from exact_interpreter import record_launches
from hypothesis import given, settings
from hypothesis import strategies as st

from megalign.kernels import quantise, reference
from megalign.kernels.tiles import Fp8Error, Fp8Tensor

SHAPES = [(128, 128), (1, 1), (130, 200), (257, 64), (64, 384)]


def check_all(x: torch.Tensor, power_of_two: bool = True) -> None:
    check_quantise(quantise, x, power_of_two)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_dtypes(shape: tuple[int, int], dtype: torch.dtype):
    check_all((torch.randn(shape) * torch.exp(torch.randn(shape[0], 1))).to(dtype))


def outliers(x: torch.Tensor) -> torch.Tensor:
    x.view(-1)[::97] *= 3000
    return x


CONTENTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "zeros": torch.zeros_like,
    "all equal": lambda x: torch.full_like(x, -0.3),
    "outliers": outliers,
    "subnormal": lambda x: x * 1e-39,
    "huge": lambda x: (x * 1e38).clamp(-3e38, 3e38),
    "one number": lambda x: torch.zeros_like(x).index_put((torch.tensor(3), torch.tensor(150)), torch.tensor(7.0)),
    "ties of the threshold": lambda x: torch.full_like(x, 464.0) * 2.0 ** torch.arange(x.shape[1]),
}


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("name", CONTENTS)
def test_contents(name: str, power_of_two: bool):
    check_all(CONTENTS[name](torch.randn(130, 200)).clamp(-3e38, 3e38), power_of_two)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_non_finite_numbers_mark_their_tile(bad: float):
    x = torch.randn(130, 200)
    x[5, 150] = bad
    check_all(x)
    check_all(x, power_of_two=False)
    rows, columns = quantise.quantise_rows_both(x)
    assert rows.non_finite_tiles() == columns.non_finite_tiles() == 1
    assert reference.dequantise(rows)[5, 128:].isnan().all() and reference.dequantise(rows).isnan().sum() == 72
    assert reference.dequantise(columns)[150, :128].isnan().all() and reference.dequantise(columns).isnan().sum() == 128


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.floats(-100, 100), st.integers(0, 2**31))
def test_random_shapes(m: int, k: int, log_size: float, seed: int):
    check_all(torch.randn(m, k, generator=torch.Generator().manual_seed(seed)) * 2.0**log_size)


def test_strided_input_is_read_where_it_lies():
    wide = torch.randn(100, 500)
    check_all(wide[:, 7:207])
    check_all(wide.t()[:130])


def test_experts():
    w = torch.randn(3, 130, 200)
    for got, want in zip(quantise.quantise_blocks_both(w), reference.quantise_blocks_both(w)):
        assert_equal(got, want)


def test_nothing_to_quantise():
    rows, columns = quantise.quantise_rows_both(torch.empty(0, 256))
    assert rows.shape == (0, 256) and columns.shape == (256, 0)


def test_what_is_compiled_ahead_is_what_was_launched():
    with record_launches() as launches:
        for dtype, power_of_two in ((torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)):
            check_all(torch.randn(16, 16, dtype=dtype), power_of_two)
    assert not ahead.unlaunched(ahead.load_cases("cases_quantise"), launches)


def test_a_view_is_retiled_as_what_it_is():
    rows = reference.quantise_rows(torch.randn(130, 384))
    part = Fp8Tensor(rows.data[3:, :256], rows.scale[:2, 3:], 250, "rows")
    assert not part.data.is_contiguous() and not part.scale.is_contiguous()
    assert_equal(quantise.retile(part), reference.retile(part))


def test_refusals():
    with pytest.raises(Fp8Error, match="int64"):
        quantise.quantise_rows(torch.zeros(4, 4, dtype=torch.int64))
    with pytest.raises(Fp8Error, match="2 dimensions"):
        quantise.quantise_rows(torch.zeros(4))
    with pytest.raises(Fp8Error, match="retile needs rows"):
        quantise.retile(reference.quantise_blocks(torch.zeros(4, 4)))

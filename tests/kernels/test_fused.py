"""RMSNorm and SwiGLU that write FP8: formulas against autograd in float64, kernels against the reference (F8)."""

from __future__ import annotations

from types import ModuleType

import ahead
import pytest
import torch
from checks import relative
from exact_interpreter import record_launches

from megalign.kernels import fused, fused_triton
from megalign.kernels.reference import dequantise, quantise_rows_both
from megalign.kernels.tiles import Fp8Error, Fp8Tensor

BF16 = torch.bfloat16


def inputs(m: int, f: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """h [m, 2f] and da [m, f] whose rows and tiles differ in size."""
    generator = torch.Generator().manual_seed(m)
    spread = torch.exp2(torch.randint(-3, 4, (m, 1), generator=generator).float())
    return (2 * torch.randn(m, 2 * f, generator=generator)).to(dtype), (spread * torch.randn(m, f, generator=generator)).to(dtype)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_reference_is_the_formula(dtype: torch.dtype):
    """Against float64 autograd: both layouts within FP8's rounding, and not closer."""
    h, da = inputs(130, 256, dtype)
    wide = h.double().requires_grad_()
    a = torch.nn.functional.silu(wide[:, :256]) * wide[:, 256:]
    a.backward(da.double())
    gamma = torch.rand(512).to(dtype)
    norm = torch.nn.functional.rms_norm(h.double(), (512,), gamma.double(), 1e-5)
    assert wide.grad is not None
    pairs = [(fused.swiglu_quantise(h), a.detach()), (fused.swiglu_quantise_backward(h, da), wide.grad), (fused.rms_norm_quantise(h, gamma)[:2], norm)]
    for (rows, columns), exact in pairs:
        assert 0.02 < relative(dequantise(rows), exact) < 0.03 and 0.02 < relative(dequantise(columns), exact.t()) < 0.03


def agree(found: Fp8Tensor, expected: Fp8Tensor) -> None:
    """exp and sums differ in the last bit between numpy and torch, which moves a BF16 tie and then a byte now and then."""
    assert (found.shape, found.tiling) == (expected.shape, expected.tiling)
    assert float((found.data.view(torch.uint8) != expected.data.view(torch.uint8)).float().mean()) < 3e-4
    assert float((found.scale != expected.scale).float().mean()) < 3e-3
    assert relative(dequantise(found), dequantise(expected)) < 1e-3


def check_swiglu(kernels: ModuleType, m: int, f: int, dtype: torch.dtype) -> None:
    h, da = inputs(m, f, dtype)
    for found, expected in zip((*kernels.swiglu_quantise(h), *kernels.swiglu_quantise_backward(h, da)), (*fused.swiglu_quantise(h), *fused.swiglu_quantise_backward(h, da))):
        agree(found, expected)


def check_norm(kernels: ModuleType, m: int, k: int, dtype: torch.dtype) -> None:
    x, gamma = inputs(m, k, dtype)[1], torch.rand(k).to(dtype)
    *found, inverse = kernels.rms_norm_quantise(x, gamma)
    *expected, exact = fused.rms_norm_quantise(x, gamma)
    torch.testing.assert_close(inverse, exact, rtol=1e-6, atol=0)
    for one, other in zip(found, expected):
        agree(one, other)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_kernels_equal_the_reference(dtype: torch.dtype):
    with record_launches() as launches:
        check_swiglu(fused_triton, 130, 256, dtype)
        check_norm(fused_triton, 130, 300, dtype)
    kernels = [launch.kernel.split(":")[1] for launch in launches]
    assert kernels == ["swiglu_kernel", "swiglu_backward_kernel", "rms_kernel", "rms_quantise_kernel"]


def test_fused_is_unfused_on_the_rounded_result():
    """What the fusion leaves out is a write and a read, not a rounding."""
    h, _ = inputs(130, 256, BF16)
    gate, up = h.float().chunk(2, -1)
    for found, expected in zip(fused_triton.swiglu_quantise(h), quantise_rows_both((torch.nn.functional.silu(gate) * up).to(BF16))):
        agree(found, expected)


def test_a_non_finite_input_marks_its_tiles_alone():
    h, _ = inputs(130, 256, BF16)
    h[5, 3] = torch.nan
    rows, columns = fused_triton.swiglu_quantise(h)
    assert int(rows.non_finite_tiles()) == int(columns.non_finite_tiles()) == 1 and rows.scale[0, 5].isnan()


@pytest.mark.parametrize("kernels", [fused, fused_triton], ids=["reference", "triton"])
def test_a_row_whose_squares_overflow_is_marked(kernels: ModuleType):
    """1 / rms would be 0 and the row, finite numbers, would silently become zeros."""
    x = torch.randn(130, 300)
    x[7] *= 1e25
    rows, columns, inverse = kernels.rms_norm_quantise(x, torch.ones(300))
    assert inverse.isnan().nonzero().flatten().tolist() == [7]
    assert rows.scale.isnan().nonzero().tolist() == [[k, 7] for k in range(3)] and int(columns.non_finite_tiles()) == 300
    assert not dequantise(rows)[8:].isnan().any()


def test_what_is_compiled_ahead_is_what_was_launched():
    h, da = inputs(4, 128, BF16)
    with record_launches() as launches:
        fused_triton.swiglu_quantise(h)
        fused_triton.swiglu_quantise_backward(h, da)
        fused_triton.rms_norm_quantise(h, torch.ones(256, dtype=BF16))
    assert not ahead.unlaunched(ahead.load_cases("cases_fused"), launches)


def test_views_and_no_tokens():
    h, da = inputs(130, 512, BF16)
    view, odd = h[:, 512:], da[:, ::2]
    for found, expected in zip(
        (*fused_triton.swiglu_quantise(view), *fused_triton.swiglu_quantise_backward(view, odd)), (*fused.swiglu_quantise(view), *fused.swiglu_quantise_backward(view, odd))
    ):
        agree(found, expected)
    none = (*fused_triton.swiglu_quantise(h[:0]), *fused_triton.swiglu_quantise_backward(h[:0], da[:0]), *fused_triton.rms_norm_quantise(h[:0], torch.ones(1024))[:2])
    assert all(0 in found.shape for found in none)


def test_shapes_are_checked():
    with pytest.raises(Fp8Error, match=r"h is \(4, 200\); it must be \[M, 2F\] with F a multiple of 128"):
        fused_triton.swiglu_quantise(torch.zeros(4, 200))
    with pytest.raises(Fp8Error, match=r"gamma torch.float32 \(3,\)"):
        fused_triton.rms_norm_quantise(torch.zeros(4, 200), torch.zeros(3))
    with pytest.raises(Fp8Error, match=r"da is \(4, 3\)"):
        fused.swiglu_quantise_backward(torch.zeros(4, 256), torch.zeros(4, 3))
    for kernels in (fused, fused_triton):
        with pytest.raises(Fp8Error, match="cannot quantise torch.float64"):
            kernels.swiglu_quantise(torch.zeros(4, 256, dtype=torch.float64))
        with pytest.raises(Fp8Error, match="gamma torch.int64"):
            kernels.rms_norm_quantise(torch.zeros(4, 200), torch.zeros(200, dtype=torch.long))
        with pytest.raises(Fp8Error, match="on meta"):
            kernels.swiglu_quantise_backward(torch.zeros(4, 256), torch.zeros(4, 128, device="meta"))


BREAKS = [
    ("check_swiglu", "up half read as gate", "up = tl.load(own + F,", "up = tl.load(own,"),
    ("check_swiglu", "derivative of silu", "(1.0 + wide * (1.0 - s))", "(1.0 + wide * s)"),
    ("check_swiglu", "halves swapped", "of_up = tile_h >= tiles_f", "of_up = tile_h < tiles_f"),
    ("check_swiglu", "tile of columns", "store_columns(x, inside, m, k, tile_m,", "store_columns(x, inside, m, k, tile_m * 0,"),
    ("check_swiglu", "tile of rows", "store_rows(x, inside, m, k, tile_k,", "store_rows(x, inside, m, k, tile_k * 0,"),
    ("check_swiglu", "dup stored as dgate", "inside, m, h, tile_m, tile_h", "inside, m, k, tile_m, tile_h"),
    ("check_swiglu", "last tile row dropped", "(ceil_tiles(m), ceil_tiles(f))", "(m // TILE, ceil_tiles(f))"),
    ("check_norm", "mean over one block", "tl.sum(total, 1) / K", "tl.sum(total, 1) / COLUMNS"),
    ("check_norm", "gamma forgotten", "inverse[:, None] * gamma[None, :]", "inverse[:, None]"),
    ("check_norm", "tail of a row dropped", "for start in range(0, K, COLUMNS)", "for start in range(0, K // COLUMNS * COLUMNS, COLUMNS)"),
]


@pytest.mark.parametrize("check, what, old, new", BREAKS, ids=[row[1] for row in BREAKS])
def test_a_broken_kernel_is_noticed(check: str, what: str, old: str, new: str, tmp_path):
    from mutants import mutant

    broken = mutant(fused_triton, tmp_path, old, new)
    with pytest.raises(AssertionError):
        check_swiglu(broken, 130, 256, BF16) if check == "check_swiglu" else check_norm(broken, 130, 300, BF16)

"""What the tests of the FP8 kernels compare, and the checks that sound kernels pass and broken ones must not."""

from __future__ import annotations

from types import ModuleType

import torch

from megalign.kernels import reference
from megalign.kernels.groups import GroupLayout
from megalign.kernels.tiles import TILE, Fp8Tensor, ceil_tiles

EXACT, ROUNDED = 1e-6, 2.5e-3  # relative errors of a matmul with FP32 and with BF16 output (fp8.md)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def calc_diff(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double(), b.double()
    return (1 - 2 * (a * b).sum() / ((a * a).sum() + (b * b).sum())).item()


def assert_equal(got: Fp8Tensor, want: Fp8Tensor) -> None:
    """Every byte and scale, padding included; a NaN equals a NaN, for its sign is not specified."""
    assert (got.shape, got.tiling) == (want.shape, want.tiling)
    nan = want.data.float().isnan()
    assert torch.equal(got.data.float().isnan(), nan)
    assert torch.equal(got.data.view(torch.uint8)[~nan], want.data.view(torch.uint8)[~nan])
    torch.testing.assert_close(got.scale, want.scale, rtol=0, atol=0, equal_nan=True)


def assert_close(got: torch.Tensor, exact: torch.Tensor) -> None:
    """`got` against float64: FP32 within 1e-6; BF16 within 2.5e-3 and not closer than rounding allows."""
    assert got.shape == exact.shape
    error = relative(got, exact)
    if got.dtype == torch.bfloat16:
        assert (5e-4 if got.numel() > 100 else 0) < error < ROUNDED and calc_diff(got, exact) < 1e-5
    else:
        assert error < EXACT and calc_diff(got, exact) < 1e-5


def check_quantise(kernels: ModuleType, x: torch.Tensor, power_of_two: bool = True) -> None:
    """Rows, columns, blocks, transposed blocks and re-tiling of x [M, K]: bytes and scales of the reference."""
    for name in ("quantise_rows_both", "quantise_blocks_both"):
        for got, want in zip(*(getattr(module, name)(x, power_of_two=power_of_two) for module in (kernels, reference))):
            assert_equal(got, want)
    for name in ("quantise_rows", "quantise_blocks"):
        assert_equal(*(getattr(module, name)(x, power_of_two=power_of_two) for module in (kernels, reference)))
    rows = reference.quantise_rows(x, power_of_two=power_of_two)
    assert_equal(kernels.retile(rows), reference.retile(rows))


def uneven(rows: int, columns: int) -> torch.Tensor:
    """Rows, columns and 128 x 128 blocks of very different size, so that a wrong scale is a wrong result."""
    blocks = torch.exp2(torch.randint(-4, 5, (ceil_tiles(rows), ceil_tiles(columns))).float())
    blocks = blocks.repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)[:rows, :columns]
    return torch.randn(rows, columns) * blocks * torch.exp2(torch.randint(-3, 4, (rows, 1)).float()) * torch.exp2(torch.randint(-3, 4, (1, columns)).float())


def check_matmul(kernels: ModuleType, m: int, n: int, k: int, config, dtype: torch.dtype = torch.float32, power_of_two: bool = True) -> None:
    """Forward and dgrad shapes against float64 of the dequantised operands."""
    x, w = reference.quantise_rows(uneven(m, k), power_of_two=power_of_two), reference.quantise_blocks(uneven(n, k), power_of_two=power_of_two)
    exact = reference.dequantise(x, torch.float64) @ reference.dequantise(w, torch.float64).t()
    assert_close(kernels.matmul(x, w, dtype, config), exact)


def check_wgrad(kernels: ModuleType, m: int, n: int, k: int, config, out: torch.Tensor | None = None, power_of_two: bool = True) -> None:
    """dW, or dW added to `out` [n, k] where it lies."""
    dy, x = (reference.quantise_rows(uneven(rows, m), power_of_two=power_of_two) for rows in (n, k))
    exact = reference.dequantise(dy, torch.float64) @ reference.dequantise(x, torch.float64).t()
    if out is not None:
        exact = out.double() + exact
    got = kernels.wgrad(dy, x, out, config=config)
    assert out is None or got.data_ptr() == out.data_ptr()
    assert_close(got, exact)


def check_grouped(matmul: ModuleType, wgrad: ModuleType, sizes: list[int], n: int, k: int, configs, accumulate: bool = True) -> None:
    """Experts of `sizes` tokens, one by one in float64; unused tiles are zeros, an empty expert's gradient stays."""
    layout = GroupLayout.of(torch.tensor(sizes), sum(sizes))
    x, dy = layout.pad(uneven(sum(sizes), k)), layout.pad(uneven(sum(sizes), n))
    x[layout.starts[-1] :] = dy[layout.starts[-1] :] = 1  # what no expert owns must not count
    (x_rows, x_t), (_, dy_t) = reference.quantise_rows_both(x), reference.quantise_rows_both(dy)
    w = reference.quantise_blocks(torch.stack([uneven(n, k) for _ in sizes]))
    y = matmul.grouped_matmul(x_rows, w, layout, torch.float32, configs[0])
    before = torch.randn(len(sizes), n, k) if accumulate else torch.zeros(len(sizes), n, k)
    main = before.clone()
    main = wgrad.grouped_wgrad(dy_t, x_t, layout, main if accumulate else None, config=configs[1])
    exact_x, exact_x_t, exact_dy_t = (reference.dequantise(t, torch.float64) for t in (x_rows, x_t, dy_t))
    exact_w, starts = reference.dequantise(w, torch.float64), layout.starts.tolist()
    exact_y, exact_grad = torch.zeros(layout.rows, n, dtype=torch.float64), before.double()
    for g, (first, last) in enumerate(zip(starts, starts[1:])):
        exact_y[first:last] = exact_x[first:last] @ exact_w[g].t()
        exact_grad[g] += exact_dy_t[:, first:last] @ exact_x_t[:, first:last].t()
    assert_close(y, exact_y)
    assert not y[starts[-1] :].any()
    assert_close(main, exact_grad)
    for g, size in enumerate(sizes):
        assert size or torch.equal(main[g], before[g])


def check_promotion(kernels: ModuleType, config) -> None:
    """Steps whose scales differ by 2^20: a sum that leaves FP32, or takes one scale for all steps, loses the small one."""
    x = torch.ones(128, 384)
    x[:, 128:256] *= 2.0**-20
    w = torch.ones(128, 384)
    w[:, 256:] = -1
    w[:, :128] = 1  # 128 + 128 * 2^-20 - 128
    rows, blocks = reference.quantise_rows(x), reference.quantise_blocks(w)
    y = kernels.matmul(rows, blocks, torch.float32, config)
    assert torch.equal(y, torch.full_like(y, 128 * 2.0**-20))


def quantise_inputs() -> list[torch.Tensor]:
    """Small inputs that together reach every rule of quantisation."""
    marked = uneven(130, 200)
    marked[5, 150] = marked[129, 3] = torch.inf
    return [uneven(130, 200), uneven(257, 64).bfloat16(), torch.full((4, 130), 464.00003), torch.zeros(3, 130), marked]

"""RMSNorm and SwiGLU that write FP8: Triton kernels of the functions in `fused.py`.

One program owns a 128 x 128 tile of the result, computes it in FP32 from one read of its inputs, rounds it to the type of
the inputs, and stores it quantised in both layouts, with the functions of quantise.py. RMSNorm needs its row
sums first: a program of 16 rows of `rms_kernel` reads them, and the tile kernel reads x once more; a fusion into one kernel
would leave 64 programs of 128 rows for 8,192 tokens, half of the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalign.kernels.fused import check_norm, check_swiglu
from megalign.kernels.launch import launch
from megalign.kernels.quantise import store_columns, store_rows
from megalign.kernels.tiles import TILE, Fp8Tensor, ceil_tiles

WARPS = 8
NORM_ROWS = 16


@triton.jit
def store_both(x, inside, m, k, tile_m, tile_k, row_ptr, row_scale_ptr, column_ptr, column_scale_ptr, M, K, TILE: tl.constexpr):
    """Quantise one tile of fp32 along its rows and along its columns."""
    store_rows(x, inside, m, k, tile_k, row_ptr, row_scale_ptr, M, K, True, TILE)
    store_columns(x, inside, m, k, tile_m, column_ptr, column_scale_ptr, M, K, True, TILE)


@triton.jit
def rms_kernel(
    x_ptr,  # [M, K] IN
    inverse_ptr,  # [M] fp32 OUT: 1 / sqrt(mean(x^2) + eps)
    M,
    K,
    eps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, K, COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        x = tl.load(x_ptr + m.to(tl.int64)[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)
        total += x * x
    mean = tl.sum(total, 1) / K
    inverse = tl.where(mean < float("inf"), 1.0 / tl.sqrt(mean + eps), float("nan"))  # an overflow would turn the row into zeros
    tl.store(inverse_ptr + m, inverse, mask=m < M)


@triton.jit
def rms_quantise_kernel(
    x_ptr,  # [M, K] IN
    gamma_ptr,  # [K] IN
    inverse_ptr,  # [M] fp32 IN
    row_ptr,  # [M, K'] e4m3 OUT
    row_scale_ptr,  # [K'/128, M] fp32 OUT
    column_ptr,  # [K, M'] e4m3 OUT
    column_scale_ptr,  # [M'/128, K] fp32 OUT
    M,
    K,
    TILE: tl.constexpr,
):
    tile_m, tile_k = tl.program_id(0), tl.program_id(1)
    m = tile_m * TILE + tl.arange(0, TILE)
    k = tile_k * TILE + tl.arange(0, TILE)
    inside = (m < M)[:, None] & (k < K)[None, :]
    x = tl.load(x_ptr + m.to(tl.int64)[:, None] * K + k[None, :], mask=inside, other=0.0)
    inverse = tl.load(inverse_ptr + m, mask=m < M, other=0.0)
    gamma = tl.load(gamma_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    y = (x.to(tl.float32) * inverse[:, None] * gamma[None, :]).to(x.dtype).to(tl.float32)
    store_both(y, inside, m, k, tile_m, tile_k, row_ptr, row_scale_ptr, column_ptr, column_scale_ptr, M, K, TILE)


@triton.jit
def swiglu_kernel(
    h_ptr,  # [M, 2F] IN: gate, up
    row_ptr,  # [M, F] e4m3 OUT
    row_scale_ptr,  # [F/128, M] fp32 OUT
    column_ptr,  # [F, M'] e4m3 OUT
    column_scale_ptr,  # [M'/128, F] fp32 OUT
    M,
    F,
    TILE: tl.constexpr,
):
    tile_m, tile_k = tl.program_id(0), tl.program_id(1)
    m = tile_m * TILE + tl.arange(0, TILE)
    k = tile_k * TILE + tl.arange(0, TILE)
    inside = (m < M)[:, None] & (k < F)[None, :]
    own = h_ptr + m.to(tl.int64)[:, None] * (2 * F) + k[None, :]
    gate = tl.load(own, mask=inside, other=0.0)
    up = tl.load(own + F, mask=inside, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    a = (wide * (1.0 / (1.0 + tl.exp(-wide))) * up).to(gate.dtype).to(tl.float32)
    store_both(a, inside, m, k, tile_m, tile_k, row_ptr, row_scale_ptr, column_ptr, column_scale_ptr, M, F, TILE)


@triton.jit
def swiglu_backward_kernel(
    h_ptr,  # [M, 2F] IN: gate, up
    da_ptr,  # [M, F] IN
    row_ptr,  # [M, 2F] e4m3 OUT: dgate, dup
    row_scale_ptr,  # [2F/128, M] fp32 OUT
    column_ptr,  # [2F, M'] e4m3 OUT
    column_scale_ptr,  # [M'/128, 2F] fp32 OUT
    M,
    F,
    TILE: tl.constexpr,
):
    """One program computes one tile of dgate or of dup: registers hold one result."""
    tile_m, tile_h = tl.program_id(0), tl.program_id(1)
    tiles_f = F // TILE
    of_up = tile_h >= tiles_f
    m = tile_m * TILE + tl.arange(0, TILE)
    k = (tile_h % tiles_f) * TILE + tl.arange(0, TILE)
    rows = m.to(tl.int64)[:, None]
    valid = (m < M)[:, None]
    gate = tl.load(h_ptr + rows * (2 * F) + k[None, :], mask=valid, other=0.0)
    da = tl.load(da_ptr + rows * F + k[None, :], mask=valid, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-wide))
    if of_up:
        dh = da * (wide * s)
    else:
        up = tl.load(h_ptr + rows * (2 * F) + F + k[None, :], mask=valid, other=0.0).to(tl.float32)
        dh = da * up * s * (1.0 + wide * (1.0 - s))
    h = tile_h * TILE + tl.arange(0, TILE)
    inside = valid & (h < 2 * F)[None, :]
    store_both(dh.to(gate.dtype).to(tl.float32), inside, m, h, tile_m, tile_h, row_ptr, row_scale_ptr, column_ptr, column_scale_ptr, M, 2 * F, TILE)


def rms_norm_quantise(x: Tensor, gamma: Tensor, eps: float = 1e-5) -> tuple[Fp8Tensor, Fp8Tensor, Tensor]:
    """fused.rms_norm_quantise."""
    check_norm(x, gamma)
    x, gamma = x.contiguous(), gamma.contiguous()
    m, k = x.shape
    inverse = torch.empty(m, dtype=torch.float32, device=x.device)
    rows, columns, outputs = _outputs(m, k, x.device)
    if x.numel():
        launch(rms_kernel, (-(-m // NORM_ROWS),), x, inverse, m, k, eps, ROWS=NORM_ROWS, COLUMNS=256, num_warps=WARPS, device=x.device)
        launch(rms_quantise_kernel, (ceil_tiles(m), ceil_tiles(k)), x, gamma, inverse, *outputs, m, k, TILE=TILE, num_warps=WARPS, device=x.device)
    return rows, columns, inverse


def swiglu_quantise(h: Tensor) -> tuple[Fp8Tensor, Fp8Tensor]:
    """fused.swiglu_quantise."""
    check_swiglu(h)
    m, f = h.shape[0], h.shape[1] // 2
    rows, columns, outputs = _outputs(m, f, h.device)
    if h.numel():
        launch(swiglu_kernel, (ceil_tiles(m), ceil_tiles(f)), h.contiguous(), *outputs, m, f, TILE=TILE, num_warps=WARPS, device=h.device)
    return rows, columns


def swiglu_quantise_backward(h: Tensor, da: Tensor) -> tuple[Fp8Tensor, Fp8Tensor]:
    """fused.swiglu_quantise_backward."""
    check_swiglu(h, da)
    m, f = h.shape[0], h.shape[1] // 2
    rows, columns, outputs = _outputs(m, 2 * f, h.device)
    if h.numel():
        inputs = (h.contiguous(), da.contiguous())
        launch(swiglu_backward_kernel, (ceil_tiles(m), 2 * ceil_tiles(f)), *inputs, *outputs, m, f, TILE=TILE, num_warps=WARPS, device=h.device)
    return rows, columns


def _outputs(m: int, k: int, device: torch.device) -> tuple[Fp8Tensor, Fp8Tensor, tuple[Tensor, ...]]:
    rows, columns = Fp8Tensor.empty(m, k, "rows", device), Fp8Tensor.empty(k, m, "rows", device)
    return rows, columns, (rows.data, rows.scale, columns.data, columns.scale)

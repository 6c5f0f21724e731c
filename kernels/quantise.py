"""Quantisation in Triton: one read of a matrix, every FP8 layout of it that the matmuls want.

    quantise_rows     x [M, K]  ->  x in 1 x 128 tiles, and x^T in 1 x 128 tiles (= 128 x 1 tiles of x)
    quantise_blocks   w [N, K]  ->  W in 128 x 128 blocks, and W^T: the same bytes, the same scales
    retile            x in 1 x 128 tiles (FP8)  ->  x^T in 1 x 128 tiles

One program owns one 128 x 128 tile. It reads 2 bytes a number and writes 1 or 2, so its floor is memory bandwidth; the
transposed copy is written from the registers of the same program, because a second kernel would read x again, and an
FP8 matmul operand in the other order compiles to byte-wide stores. 8 warps hold the tile in 64 registers a thread.

The scale is integer arithmetic on the bits of the largest magnitude (see reference.py): no division, no logarithm.
The maximum is taken over those bits as integers, for two reasons: bits of |x| are ordered as |x| is, and NaN and
infinity are larger than every finite number, while a floating-point maximum on the GPU would drop a NaN silently.
A tile with one of them gets a NaN scale, and every byte of it becomes NaN.

Nothing is lost against the reference: bytes and scales are equal (tests/kernels/test_quantise.py).
Reads: float32, bfloat16 or float16, rows at any stride. Any shape: what lies beyond the edge counts as zero.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from megalign.kernels.launch import launch
from megalign.kernels.reference import check_input
from megalign.kernels.tiles import TILE, Fp8Error, Fp8Tensor, ceil_tiles

WARPS = 8  # of every kernel here: 128 x 128 numbers in 256 threads


@triton.jit
def tile_scale(bits):
    """(scale, 1 / scale) from the integer bits of the largest |x|; NaN, NaN for bits of an infinity or a NaN."""
    e = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x680000).to(tl.int32)
    e = tl.minimum(tl.maximum(e, 1), 253)
    finite = bits < 0x7F800000
    scale = tl.where(finite, e << 23, 0x7FC00000).to(tl.float32, bitcast=True)
    factor = tl.where(finite, (254 - e) << 23, 0x7FC00000).to(tl.float32, bitcast=True)
    return scale, factor


@triton.jit
def magnitude_bits(x):
    """Bits of |x| (fp32) as integers: ordered as |x|, infinity and NaN above all finite numbers."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def quantise_rows_kernel(
    x_ptr,  # [M, K] fp32, bf16 or fp16, row stride x_stride, IN
    row_ptr,  # [M, K'] e4m3 OUT: x in 1 x 128 tiles
    row_scale_ptr,  # [K'/128, M] fp32 OUT
    column_ptr,  # [K, M'] e4m3 OUT: x^T in 1 x 128 tiles
    column_scale_ptr,  # [M'/128, K] fp32 OUT
    M,
    K,
    x_stride,
    ROWS: tl.constexpr,  # write x
    COLUMNS: tl.constexpr,  # write x^T
    TILE: tl.constexpr,  # 128
):
    tile_m, tile_k = tl.program_id(0), tl.program_id(1)
    m = tile_m * TILE + tl.arange(0, TILE)
    k = tile_k * TILE + tl.arange(0, TILE)
    inside = (m < M)[:, None] & (k < K)[None, :]
    x = tl.load(x_ptr + m.to(tl.int64)[:, None] * x_stride + k[None, :], mask=inside, other=0.0).to(tl.float32)
    bits = magnitude_bits(x)
    if ROWS:
        scale, factor = tile_scale(tl.max(bits, 1))
        q = tl.where(inside, x * factor[:, None], 0.0).to(tl.float8e4nv)
        stride = tl.cdiv(K, TILE) * TILE
        tl.store(row_ptr + m.to(tl.int64)[:, None] * stride + k[None, :], q, mask=(m < M)[:, None])
        tl.store(row_scale_ptr + tile_k.to(tl.int64) * M + m, scale, mask=m < M)
    if COLUMNS:
        scale, factor = tile_scale(tl.max(bits, 0))
        q = tl.where(inside, x * factor[None, :], 0.0).to(tl.float8e4nv)
        stride = tl.cdiv(M, TILE) * TILE
        tl.store(column_ptr + k.to(tl.int64)[:, None] * stride + m[None, :], tl.trans(q), mask=(k < K)[:, None])
        tl.store(column_scale_ptr + tile_m.to(tl.int64) * K + k, scale, mask=k < K)


@triton.jit
def quantise_blocks_kernel(
    w_ptr,  # [G, N, K] fp32, bf16 or fp16, contiguous, IN
    block_ptr,  # [G, N, K'] e4m3 OUT: W
    block_scale_ptr,  # [G, ceil(N/128), K'/128] fp32 OUT
    transposed_ptr,  # [G, K, N'] e4m3 OUT: W^T
    transposed_scale_ptr,  # [G, ceil(K/128), N'/128] fp32 OUT
    N,
    K,
    TRANSPOSED: tl.constexpr,  # write W^T
    TILE: tl.constexpr,  # 128
):
    tile_n, tile_k, g = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    tiles_n, tiles_k = tl.cdiv(N, TILE), tl.cdiv(K, TILE)
    n = tile_n * TILE + tl.arange(0, TILE)
    k = tile_k * TILE + tl.arange(0, TILE)
    inside = (n < N)[:, None] & (k < K)[None, :]
    w = tl.load(w_ptr + (g * N + n)[:, None] * K + k[None, :], mask=inside, other=0.0).to(tl.float32)
    scale, factor = tile_scale(tl.max(tl.max(magnitude_bits(w), 1), 0))
    q = tl.where(inside, w * factor, 0.0).to(tl.float8e4nv)
    tl.store(block_ptr + (g * N + n)[:, None] * (tiles_k * TILE) + k[None, :], q, mask=(n < N)[:, None])
    tl.store(block_scale_ptr + (g * tiles_n + tile_n) * tiles_k + tile_k, scale)
    if TRANSPOSED:
        tl.store(transposed_ptr + (g * K + k)[:, None] * (tiles_n * TILE) + n[None, :], tl.trans(q), mask=(k < K)[:, None])
        tl.store(transposed_scale_ptr + (g * tiles_k + tile_k) * tiles_n + tile_n, scale)


@triton.jit
def retile_kernel(
    x_ptr,  # [M, K'] e4m3 IN: x in 1 x 128 tiles
    x_scale_ptr,  # [K'/128, M] fp32 IN
    column_ptr,  # [K, M'] e4m3 OUT: x^T in 1 x 128 tiles
    column_scale_ptr,  # [M'/128, K] fp32 OUT
    M,
    K,
    TILE: tl.constexpr,  # 128
):
    tile_m, tile_k = tl.program_id(0), tl.program_id(1)
    m = tile_m * TILE + tl.arange(0, TILE)
    k = tile_k * TILE + tl.arange(0, TILE)
    q = tl.load(x_ptr + m.to(tl.int64)[:, None] * (tl.cdiv(K, TILE) * TILE) + k[None, :], mask=(m < M)[:, None], other=0.0)
    old = tl.load(x_scale_ptr + tile_k.to(tl.int64) * M + m, mask=m < M, other=0.0)
    x = q.to(tl.float32) * old[:, None]
    scale, factor = tile_scale(tl.max(magnitude_bits(x), 0))
    moved = tl.where((m < M)[:, None], x * factor[None, :], 0.0).to(tl.float8e4nv)
    tl.store(column_ptr + k.to(tl.int64)[:, None] * (tl.cdiv(M, TILE) * TILE) + m[None, :], tl.trans(moved), mask=(k < K)[:, None])
    tl.store(column_scale_ptr + tile_m.to(tl.int64) * K + k, scale, mask=k < K)


def quantise_rows(x: Tensor) -> Fp8Tensor:
    """Activations x [M, K] in tiles of 1 x 128; reference.quantise_rows."""
    rows, _ = _quantise_rows(x, columns=False)
    return rows


def quantise_rows_both(x: Tensor) -> tuple[Fp8Tensor, Fp8Tensor]:
    """(x [M, K], x^T [K, M]), each in tiles of 1 x 128, from one read; reference.quantise_rows_both."""
    rows, columns = _quantise_rows(x, columns=True)
    assert columns is not None
    return rows, columns


def _quantise_rows(x: Tensor, columns: bool) -> tuple[Fp8Tensor, Fp8Tensor | None]:
    check_input(x, (2,))
    x = x if x.stride(-1) == 1 else x.contiguous()
    m, k = x.shape
    rows = Fp8Tensor.empty(m, k, "rows", x.device)
    transposed = Fp8Tensor.empty(k, m, "rows", x.device) if columns else None
    other = transposed or rows
    if x.numel():
        grid = (ceil_tiles(m), ceil_tiles(k))
        outputs = (rows.data, rows.scale, other.data, other.scale)
        launch(quantise_rows_kernel, grid, x, *outputs, m, k, x.stride(0), ROWS=True, COLUMNS=columns, TILE=TILE, num_warps=WARPS, device=x.device)
    return rows, transposed


def quantise_blocks(w: Tensor) -> Fp8Tensor:
    """Weights w [N, K] or [G, N, K] in blocks of 128 x 128; reference.quantise_blocks."""
    return _quantise_blocks(w, transposed=False)[0]


def quantise_blocks_both(w: Tensor) -> tuple[Fp8Tensor, Fp8Tensor]:
    """(W [.., N, K], W^T [.., K, N]) in blocks of 128 x 128, from one read; reference.quantise_blocks_both."""
    w_fp8, w_t = _quantise_blocks(w, transposed=True)
    assert w_t is not None
    return w_fp8, w_t


def _quantise_blocks(w: Tensor, transposed: bool) -> tuple[Fp8Tensor, Fp8Tensor | None]:
    check_input(w, (2, 3))
    w = w.contiguous()
    groups = w.shape[0] if w.dim() == 3 else None
    n, k = w.shape[-2:]
    blocks = Fp8Tensor.empty(n, k, "blocks", w.device, groups)
    other = Fp8Tensor.empty(k, n, "blocks", w.device, groups) if transposed else blocks
    if w.numel():
        grid = (ceil_tiles(n), ceil_tiles(k), groups or 1)
        outputs = (blocks.data, blocks.scale, other.data, other.scale)
        launch(quantise_blocks_kernel, grid, w, *outputs, n, k, TRANSPOSED=transposed, TILE=TILE, num_warps=WARPS, device=w.device)
    return blocks, other if transposed else None


def retile(x: Fp8Tensor) -> Fp8Tensor:
    """x [M, K] in tiles of 1 x 128 -> x^T [K, M] in tiles of 1 x 128; reference.retile."""
    if x.tiling != "rows":
        raise Fp8Error("retile needs rows; the transpose of blocks is transpose_blocks")
    m, k = x.rows, x.columns
    columns = Fp8Tensor.empty(k, m, "rows", x.device)
    if m and k:
        grid = (ceil_tiles(m), ceil_tiles(k))
        launch(retile_kernel, grid, x.data, x.scale, columns.data, columns.scale, m, k, TILE=TILE, num_warps=WARPS, device=x.device)
    return columns

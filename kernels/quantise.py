"""Quantisation in Triton: one read of a matrix, every FP8 layout of it that the matmuls want.

    quantise_rows     x [M, K]  ->  x in 1 x 128 tiles, and x^T in 1 x 128 tiles (= 128 x 1 tiles of x)
    quantise_blocks   w [N, K]  ->  W in 128 x 128 blocks, and W^T: the same bytes, the same scales
    retile            x in 1 x 128 tiles (FP8)  ->  x^T in 1 x 128 tiles

One program owns one 128 x 128 tile. It reads 2 bytes a number and writes 1 or 2, so its floor is memory bandwidth; the
transposed copy is written from the registers of the same program, because a second kernel would read x again, and an
FP8 matmul operand in the other order compiles to byte-wide stores. 8 warps hold the tile in 64 registers a thread.

The scale is integer arithmetic on the bits of the largest magnitude (see reference.py): no division, no logarithm.
FP32 scales (power_of_two=False: amax / 448, as other stacks have them) cost an IEEE division a number, and retile loses with them.
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
def tile_scale(bits, POWER_OF_TWO: tl.constexpr):
    """(scale, what `to_e4m3` divides by it with) from the integer bits of the largest |x|; both NaN for those of an infinity or a NaN."""
    finite = bits < 0x7F800000
    if POWER_OF_TWO:
        e = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x680000).to(tl.int32)
        e = tl.minimum(tl.maximum(e, 1), 253)
        scale = tl.where(finite, e << 23, 0x7FC00000).to(tl.float32, bitcast=True)
        factor = tl.where(finite, (254 - e) << 23, 0x7FC00000).to(tl.float32, bitcast=True)
    else:
        scale = tl.maximum(tl.div_rn(bits.to(tl.float32, bitcast=True), 448.0), 1.1754943508222875e-38)  # 2^-126
        scale = tl.where(finite, scale, float("nan"))
        factor = scale
    return scale, factor


@triton.jit
def to_e4m3(x, factor, inside, POWER_OF_TWO: tl.constexpr):
    """x over the scale of its tile, to nearest and saturating; zero outside the matrix, NaN in a marked tile."""
    if POWER_OF_TWO:
        scaled = x * factor
    else:
        scaled = tl.div_rn(x, factor)
    return tl.where(inside, scaled, 0.0).to(tl.float8e4nv)


@triton.jit
def magnitude_bits(x):
    """Bits of |x| (fp32) as integers: ordered as |x|, infinity and NaN above all finite numbers."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def store_rows(x, inside, m, k, tile_k, row_ptr, row_scale_ptr, M, K, POWER_OF_TWO: tl.constexpr, TILE: tl.constexpr):
    """Quantise a tile [TILE, TILE] of fp32 along its rows: x [M, K'] in 1 x 128 tiles, scales [K'/128, M]."""
    scale, factor = tile_scale(tl.max(magnitude_bits(x), 1), POWER_OF_TWO)  # pyright: ignore[reportGeneralTypeIssues]
    q = to_e4m3(x, factor[:, None], inside, POWER_OF_TWO)
    tl.store(row_ptr + m.to(tl.int64)[:, None] * (tl.cdiv(K, TILE) * TILE) + k[None, :], q, mask=(m < M)[:, None])
    tl.store(row_scale_ptr + tile_k.to(tl.int64) * M + m, scale, mask=m < M)


@triton.jit
def store_columns(x, inside, m, k, tile_m, column_ptr, column_scale_ptr, M, K, POWER_OF_TWO: tl.constexpr, TILE: tl.constexpr):
    """Quantise a tile [TILE, TILE] of fp32 along its columns: x^T [K, M'] in 1 x 128 tiles, scales [M'/128, K]."""
    scale, factor = tile_scale(tl.max(magnitude_bits(x), 0), POWER_OF_TWO)  # pyright: ignore[reportGeneralTypeIssues]
    q = to_e4m3(x, factor[None, :], inside, POWER_OF_TWO)
    tl.store(column_ptr + k.to(tl.int64)[:, None] * (tl.cdiv(M, TILE) * TILE) + m[None, :], tl.trans(q), mask=(k < K)[:, None])
    tl.store(column_scale_ptr + tile_m.to(tl.int64) * K + k, scale, mask=k < K)


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
    POWER_OF_TWO: tl.constexpr,
    TILE: tl.constexpr,  # 128
):
    tile_m, tile_k = tl.program_id(0), tl.program_id(1)
    m = tile_m * TILE + tl.arange(0, TILE)
    k = tile_k * TILE + tl.arange(0, TILE)
    inside = (m < M)[:, None] & (k < K)[None, :]
    x = tl.load(x_ptr + m.to(tl.int64)[:, None] * x_stride + k[None, :], mask=inside, other=0.0).to(tl.float32)
    if ROWS:
        store_rows(x, inside, m, k, tile_k, row_ptr, row_scale_ptr, M, K, POWER_OF_TWO, TILE)
    if COLUMNS:
        store_columns(x, inside, m, k, tile_m, column_ptr, column_scale_ptr, M, K, POWER_OF_TWO, TILE)


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
    POWER_OF_TWO: tl.constexpr,
    TILE: tl.constexpr,  # 128
):
    tile_n, tile_k, g = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    tiles_n, tiles_k = tl.cdiv(N, TILE), tl.cdiv(K, TILE)
    n = tile_n * TILE + tl.arange(0, TILE)
    k = tile_k * TILE + tl.arange(0, TILE)
    inside = (n < N)[:, None] & (k < K)[None, :]
    w = tl.load(w_ptr + (g * N + n)[:, None] * K + k[None, :], mask=inside, other=0.0).to(tl.float32)
    scale, factor = tile_scale(tl.max(tl.max(magnitude_bits(w), 1), 0), POWER_OF_TWO)
    q = to_e4m3(w, factor, inside, POWER_OF_TWO)
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
    inside = (m < M)[:, None] & (k < K)[None, :]
    q = tl.load(x_ptr + m.to(tl.int64)[:, None] * (tl.cdiv(K, TILE) * TILE) + k[None, :], mask=(m < M)[:, None], other=0.0)
    scale = tl.load(x_scale_ptr + tile_k.to(tl.int64) * M + m, mask=m < M, other=0.0)
    store_columns(q.to(tl.float32) * scale[:, None], inside, m, k, tile_m, column_ptr, column_scale_ptr, M, K, True, TILE)


def quantise_rows(x: Tensor, *, power_of_two: bool = True) -> Fp8Tensor:
    """Activations x [M, K] in tiles of 1 x 128; reference.quantise_rows."""
    return _quantise_rows(x, power_of_two, None)


def quantise_rows_both(x: Tensor, *, power_of_two: bool = True) -> tuple[Fp8Tensor, Fp8Tensor]:
    """(x [M, K], x^T [K, M]), each in tiles of 1 x 128, from one read; reference.quantise_rows_both."""
    check_input(x, (2,))
    transposed = Fp8Tensor.empty(x.shape[1], x.shape[0], "rows", x.device)
    return _quantise_rows(x, power_of_two, transposed), transposed


def _quantise_rows(x: Tensor, power_of_two: bool, transposed: Fp8Tensor | None) -> Fp8Tensor:
    check_input(x, (2,))
    x = x if x.stride(-1) == 1 else x.contiguous()
    m, k = x.shape
    rows = Fp8Tensor.empty(m, k, "rows", x.device)
    other = transposed or rows
    if x.numel():
        grid = (ceil_tiles(m), ceil_tiles(k))
        outputs = (rows.data, rows.scale, other.data, other.scale)
        constants = {"ROWS": True, "COLUMNS": transposed is not None, "POWER_OF_TWO": power_of_two, "TILE": TILE}
        launch(quantise_rows_kernel, grid, x, *outputs, m, k, x.stride(0), **constants, num_warps=WARPS, device=x.device)
    return rows


def quantise_blocks(w: Tensor, *, power_of_two: bool = True) -> Fp8Tensor:
    """Weights w [N, K] or [G, N, K] in blocks of 128 x 128; reference.quantise_blocks."""
    return _quantise_blocks(w, power_of_two, transposed=False)[0]


def quantise_blocks_both(w: Tensor, *, power_of_two: bool = True) -> tuple[Fp8Tensor, Fp8Tensor]:
    """(W [.., N, K], W^T [.., K, N]) in blocks of 128 x 128, from one read; reference.quantise_blocks_both."""
    return _quantise_blocks(w, power_of_two, transposed=True)


def _quantise_blocks(w: Tensor, power_of_two: bool, transposed: bool) -> tuple[Fp8Tensor, Fp8Tensor]:
    check_input(w, (2, 3))
    w = w.contiguous()
    groups = w.shape[0] if w.dim() == 3 else None
    n, k = w.shape[-2:]
    blocks = Fp8Tensor.empty(n, k, "blocks", w.device, groups)
    other = Fp8Tensor.empty(k, n, "blocks", w.device, groups) if transposed else blocks
    if w.numel():
        grid = (ceil_tiles(n), ceil_tiles(k), groups or 1)
        outputs = (blocks.data, blocks.scale, other.data, other.scale)
        constants = {"TRANSPOSED": transposed, "POWER_OF_TWO": power_of_two, "TILE": TILE}
        launch(quantise_blocks_kernel, grid, w, *outputs, n, k, **constants, num_warps=WARPS, device=w.device)
    return blocks, other


def retile(x: Fp8Tensor) -> Fp8Tensor:
    """x [M, K] in tiles of 1 x 128 -> x^T [K, M] in tiles of 1 x 128; reference.retile."""
    if x.tiling != "rows":
        raise Fp8Error("retile needs rows; the transpose of blocks is transpose_blocks")
    x = x.contiguous()
    m, k = x.rows, x.columns
    columns = Fp8Tensor.empty(k, m, "rows", x.device)
    if m and k:
        grid = (ceil_tiles(m), ceil_tiles(k))
        launch(retile_kernel, grid, x.data, x.scale, columns.data, columns.scale, m, k, TILE=TILE, num_warps=WARPS, device=x.device)
    return columns

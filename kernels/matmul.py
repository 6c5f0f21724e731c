"""FP8 matmul in Triton, rows by blocks (1D2D): the forward, dgrad, and both for the experts of a layer.

    forward   y  [M, N] = x  [M, K] W  [N, K]^T        rows x, blocks W
    dgrad     dx [M, K] = dy [M, N] W^T[K, N]^T        rows dy, blocks W^T
    grouped   y  [R', N]: each 128-row tile of x [R', K] times the W[g] of its expert

    y[m, n] = sum_k (sum_{i in step k} x[m, i] w[n, i]) * sx[k, m] * sw[n / 128, k]          k over steps of 128

What bounds it: a tensor core sums the 128 products of a step, then every partial sum is multiplied by its scales and
added in FP32 by the ordinary cores. For a 128 x 128 tile that is 64 multiply-adds a thread and step, about as many
cycles as the tensor cores need; if one waits for the other, half the speed is gone. So the tile is cut into SPLITS
columns of BLOCK_N: while the tensor cores work on one cut, the partial sums of the cut before are promoted. 128 x 192 as three cuts
of 64 fits in registers without a spill (tests/golden/kernels_sm90); a cut never straddles two blocks of W, because 64 divides 128.

Operands arrive by TMA, which also fills the rows beyond M and N with zeros. Programs are persistent: as many as
multiprocessors, each walks over tiles, eight tile rows at a time so that neighbours share W in L2. Tiles of no expert
(-1) take no steps and become zeros. Loss against the reference: the order of FP32 additions inside a step.

Any M, N, K: Fp8Tensor pads K; y is stored with rows of 16 bytes' multiples and cut afterwards if N is not a multiple of 8.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megalign.kernels.groups import GroupLayout
from megalign.kernels.launch import launch, processors
from megalign.kernels.reference import check_grouped_matmul, check_matmul
from megalign.kernels.tiles import TILE, Fp8Tensor, round_up


class MatmulConfig(NamedTuple):
    """A tile of BLOCK_M x (splits * block_n) outputs; block_n divides 128."""

    block_m: int
    block_n: int
    splits: int
    warps: int
    stages: int


# What the tuner chooses from. The first is for large shapes, the last for few tokens; all compile without a spill.
CONFIGS = (
    MatmulConfig(128, 64, 3, 8, 4),
    MatmulConfig(128, 64, 2, 8, 4),
    MatmulConfig(128, 128, 1, 8, 4),
    MatmulConfig(64, 128, 1, 4, 4),
)


@triton.jit
def tile_of(t, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(tile row, tile column) of the t-th tile: down GROUP_M rows, then one column to the right."""
    in_group = GROUP_M * tiles_n
    first = t // in_group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    return first + (t % in_group) % height, (t % in_group) // height


@triton.jit
def matmul_kernel(
    x_desc,  # [M, K'] e4m3 IN: rows
    w_desc,  # [G * N, K'] e4m3 IN: blocks
    y_desc,  # [M, N] bf16 or fp32 OUT
    x_scale_ptr,  # [K'/128, M] fp32 IN
    w_scale_ptr,  # [G, ceil(N/128), K'/128] fp32 IN
    tile_group_ptr,  # [M/128] int32 IN: expert of each 128 rows, -1 none; read if GROUPED
    M,
    N,
    K,
    programs,  # how many there are
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,  # 1 to 3 cuts of BLOCK_N columns
    GROUPED: tl.constexpr,
    GROUP_M: tl.constexpr,
    TILE: tl.constexpr,  # 128
):
    tiles_m, tiles_n, all_steps, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, SPLITS * BLOCK_N), tl.cdiv(K, TILE), tl.cdiv(N, TILE)
    for t in tl.range(tl.program_id(0), tiles_m * tiles_n, programs):
        tile_m, tile_n = tile_of(t, tiles_m, tiles_n, GROUP_M)  # pyright: ignore[reportGeneralTypeIssues]
        first_m, first_n = tile_m * BLOCK_M, tile_n * SPLITS * BLOCK_N
        m = first_m + tl.arange(0, BLOCK_M)
        steps, w_row = all_steps, 0
        w_scales = w_scale_ptr
        if GROUPED:
            g = tl.load(tile_group_ptr + first_m // TILE)
            steps = tl.where(g >= 0, all_steps, 0)
            g = tl.maximum(g, 0)
            w_row = g * N
            w_scales += g * blocks_n * all_steps
        # A cut beyond N reads rows that do not exist or are another expert's, and is not stored.
        scale0 = w_scales + tl.minimum(first_n // TILE, blocks_n - 1) * all_steps
        scale1 = w_scales + tl.minimum((first_n + BLOCK_N) // TILE, blocks_n - 1) * all_steps
        scale2 = w_scales + tl.minimum((first_n + 2 * BLOCK_N) // TILE, blocks_n - 1) * all_steps
        y0 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        y1 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        y2 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, steps):
            x = x_desc.load([first_m, k * TILE])
            x_scale = tl.load(x_scale_ptr + k * M + m, mask=m < M, other=0.0)
            w0 = w_desc.load([w_row + first_n, k * TILE])
            partial0 = tl.dot(x, w0.T)
            if SPLITS > 1:
                w1 = w_desc.load([w_row + first_n + BLOCK_N, k * TILE])
                partial1 = tl.dot(x, w1.T)
            y0 += partial0 * (x_scale * tl.load(scale0 + k))[:, None]
            if SPLITS > 2:
                w2 = w_desc.load([w_row + first_n + 2 * BLOCK_N, k * TILE])
                partial2 = tl.dot(x, w2.T)
            if SPLITS > 1:
                y1 += partial1 * (x_scale * tl.load(scale1 + k))[:, None]
            if SPLITS > 2:
                y2 += partial2 * (x_scale * tl.load(scale2 + k))[:, None]
        y_desc.store([first_m, first_n], y0.to(y_desc.dtype))
        if SPLITS > 1:
            y_desc.store([first_m, first_n + BLOCK_N], y1.to(y_desc.dtype))
        if SPLITS > 2:
            y_desc.store([first_m, first_n + 2 * BLOCK_N], y2.to(y_desc.dtype))


def matmul(x: Fp8Tensor, w: Fp8Tensor, dtype: torch.dtype = torch.bfloat16, config: MatmulConfig = CONFIGS[0]) -> Tensor:
    """y [M, N] = x [M, K] w[N, K]^T; reference.matmul."""
    check_matmul(x, w)
    return _matmul(x, w, w.rows, None, dtype, config)


def grouped_matmul(
    x: Fp8Tensor, w: Fp8Tensor, layout: GroupLayout, dtype: torch.dtype = torch.bfloat16, config: MatmulConfig = CONFIGS[0]
) -> Tensor:
    """y [R', N]: rows of each expert times its w[g] [N, K]^T, zeros in tiles of none; reference.grouped_matmul."""
    check_grouped_matmul(x, w, layout)
    return _matmul(x, w, w.rows, layout.tile_group, dtype, config)


def _matmul(x: Fp8Tensor, w: Fp8Tensor, n: int, tile_group: Tensor | None, dtype: torch.dtype, config: MatmulConfig) -> Tensor:
    x, w = x.contiguous(), w.contiguous()
    m, k = x.rows, x.columns
    y = torch.empty(m, round_up(n, 16 // dtype.itemsize), dtype=dtype, device=x.device)  # TMA wants rows of 16 bytes' multiples
    if k == 0 or y.numel() == 0:
        return y[:, :n].zero_()
    block_m, block_n, splits, warps, stages = config
    w_rows = w.data.view(-1, w.data.shape[-1])
    descriptors = (
        TensorDescriptor.from_tensor(x.data, [block_m, TILE]),
        TensorDescriptor.from_tensor(w_rows, [block_n, TILE]),
        TensorDescriptor(y, [m, n], [y.stride(0), 1], [block_m, block_n]),
    )
    tiles = -(-m // block_m) * -(-n // (splits * block_n))
    programs = min(processors(x.device), tiles)
    launch(
        matmul_kernel, (programs,), *descriptors, x.scale, w.scale, tile_group if tile_group is not None else x.scale, m, n, k, programs,
        BLOCK_M=block_m, BLOCK_N=block_n, SPLITS=splits, GROUPED=tile_group is not None, GROUP_M=8, TILE=TILE,
        num_warps=warps, num_stages=stages, device=x.device,
    )  # fmt: skip
    return y if y.shape[1] == n else y[:, :n].contiguous()

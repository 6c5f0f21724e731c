"""FP8 weight gradient in Triton, rows by rows (1D1D), added to the main gradient where it lies.

    dW[n, c] += sum_m (sum_{i in step m} dy^T[n, i] x^T[c, i]) * sdy[m, n] * sx[m, c]        m over steps of 128 tokens

    dy^T [N, M] and x^T [K, M], both in tiles of 1 x 128 along the tokens: the transposed copies that the quantise
    kernels write from the same read as the row copies. Two scales a step instead of one, so the promotion costs one
    multiplication more than the forward's.

Gradient accumulation: the program that owns a tile of dW reads it, adds in FP32 and writes it back, in FP32 or BF16,
so that no FP32 temporary of the size of W ever exists. One program owns a tile and walks all its tokens: the result
does not depend on scheduling.

Experts: their tokens lie one after the other in whole tiles (groups.py), so expert g is the steps starts[g] / 128 to
starts[g + 1] / 128 of the same two matrices. An expert without tokens takes no step: its gradient is zero, or stays.

Any shape: tokens are padded by Fp8Tensor. A main gradient whose rows are not multiples of 16 bytes cannot be reached
by TMA; it gets its sum from a temporary.
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
from megalign.kernels.matmul import tile_of
from megalign.kernels.reference import check_grouped_wgrad, check_wgrad
from megalign.kernels.tiles import TILE, Fp8Tensor, round_up


class WgradConfig(NamedTuple):
    """A tile of block_n x block_k numbers of dW."""

    block_n: int
    block_k: int
    warps: int
    stages: int


CONFIGS = (WgradConfig(128, 128, 8, 4), WgradConfig(128, 64, 8, 4), WgradConfig(64, 128, 4, 4))


@triton.jit
def wgrad_kernel(
    dy_desc,  # [N, M'] e4m3 IN: dy^T, rows
    x_desc,  # [K, M'] e4m3 IN: x^T, rows
    grad_desc,  # [G, N, K] fp32 or bf16 OUT, IN OUT if ACCUMULATE
    dy_scale_ptr,  # [M'/128, N] fp32 IN
    x_scale_ptr,  # [M'/128, K] fp32 IN
    starts_ptr,  # [G + 1] int32 IN: first token of each expert, multiples of 128; read if GROUPED
    M,
    N,
    K,
    groups,
    programs,  # how many there are
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    GROUPED: tl.constexpr,
    GROUP_N: tl.constexpr,
    TILE: tl.constexpr,  # 128
):
    tiles_n, tiles_k = tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    tiles = tiles_n * tiles_k
    for t in tl.range(tl.program_id(0), groups * tiles, programs):
        g = t // tiles
        tile_n, tile_k = tile_of(t % tiles, tiles_n, tiles_k, GROUP_N)  # pyright: ignore[reportGeneralTypeIssues]
        first_n, first_k = tile_n * BLOCK_N, tile_k * BLOCK_K
        n = first_n + tl.arange(0, BLOCK_N)
        c = first_k + tl.arange(0, BLOCK_K)
        first, last = 0, tl.cdiv(M, TILE)
        if GROUPED:
            first = tl.load(starts_ptr + g) // TILE
            last = tl.load(starts_ptr + g + 1) // TILE
        grad = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for m in tl.range(first, last):
            dy = dy_desc.load([first_n, m * TILE])
            x = x_desc.load([first_k, m * TILE])
            dy_scale = tl.load(dy_scale_ptr + m * N + n, mask=n < N, other=0.0)
            x_scale = tl.load(x_scale_ptr + m * K + c, mask=c < K, other=0.0)
            grad += tl.dot(dy, x.T) * dy_scale[:, None] * x_scale[None, :]
        if ACCUMULATE:
            grad += grad_desc.load([g, first_n, first_k]).reshape(BLOCK_N, BLOCK_K).to(tl.float32)
        grad_desc.store([g, first_n, first_k], grad.to(grad_desc.dtype).reshape(1, BLOCK_N, BLOCK_K))


def wgrad(dy_t: Fp8Tensor, x_t: Fp8Tensor, out: Tensor | None = None, dtype: torch.dtype = torch.float32, config: WgradConfig = CONFIGS[0]) -> Tensor:
    """dW [N, K] = dy^T [N, M] x^T[K, M]^T, added to `out` in place if it is given; reference.wgrad."""
    check_wgrad(dy_t, x_t, out)
    shaped = out.unsqueeze(0) if out is not None else None
    grad = _wgrad(dy_t, x_t, None, shaped, dtype, config)
    return grad[0] if out is None else out


def grouped_wgrad(
    dy_t: Fp8Tensor, x_t: Fp8Tensor, layout: GroupLayout, out: Tensor | None = None, dtype: torch.dtype = torch.float32, config: WgradConfig = CONFIGS[0]
) -> Tensor:
    """dW [G, N, K] of experts whose padded tokens lie as `layout` says; reference.grouped_wgrad."""
    check_grouped_wgrad(dy_t, x_t, layout, out)
    return _wgrad(dy_t, x_t, layout, out, dtype, config)


def _wgrad(dy_t: Fp8Tensor, x_t: Fp8Tensor, layout: GroupLayout | None, out: Tensor | None, dtype: torch.dtype, config: WgradConfig) -> Tensor:
    dy_t, x_t = dy_t.contiguous(), x_t.contiguous()
    n, k, m = dy_t.rows, x_t.rows, dy_t.columns
    groups = layout.groups if layout else 1
    if out is not None and not _reachable(out):
        return out.add_(_wgrad(dy_t, x_t, layout, None, torch.float32, config))
    grad = out
    if grad is None:
        grad = torch.empty(groups, n, round_up(k, 16 // dtype.itemsize), dtype=dtype, device=dy_t.device)
    if m == 0 or grad.numel() == 0:
        return grad if out is not None else grad[..., :k].zero_()
    block_n, block_k, warps, stages = config
    descriptors = (
        TensorDescriptor.from_tensor(dy_t.data, [block_n, TILE]),
        TensorDescriptor.from_tensor(x_t.data, [block_k, TILE]),
        TensorDescriptor(grad, [groups, n, k], list(grad.stride()), [1, block_n, block_k]),
    )
    programs = min(processors(dy_t.device), groups * -(-n // block_n) * -(-k // block_k))
    launch(
        wgrad_kernel, (programs,), *descriptors, dy_t.scale, x_t.scale, layout.starts if layout else dy_t.scale, m, n, k, groups, programs,
        BLOCK_N=block_n, BLOCK_K=block_k, ACCUMULATE=out is not None, GROUPED=layout is not None, GROUP_N=8, TILE=TILE,
        num_warps=warps, num_stages=stages, device=dy_t.device,
    )  # fmt: skip
    return grad if grad.shape[-1] == k else grad[..., :k].contiguous()


def _reachable(out: Tensor) -> bool:
    """By TMA: address and rows are multiples of 16 bytes."""
    return out.data_ptr() % 16 == 0 and out.shape[-1] * out.element_size() % 16 == 0

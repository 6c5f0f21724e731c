"""Packed rows as megatron wants them, and a rank's part of them under context parallelism."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megalign.parallel.grid import Grid


def packed_sequences(cu_seqlens: Tensor, max_seqlen: int) -> PackedSeqParams:
    """Boundaries of the documents of a packed row. cu_seqlens: int32 [n + 1], before context parallelism."""
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
    )


def context_part(x_T: Tensor, cu_seqlens: Tensor, grid: Grid) -> Tensor:
    """This rank's tokens: of each document, chunks r and 2C-1-r of 2C equal chunks (balanced causal work).

    Documents must be multiples of 2C long. [T] -> [T / C].
    """
    ranks, rank = grid.context.size, grid.context.rank
    if ranks == 1:
        return x_T
    parts = []
    for document in x_T.split((cu_seqlens[1:] - cu_seqlens[:-1]).tolist()):
        chunks = document.chunk(2 * ranks)
        parts += [chunks[rank], chunks[2 * ranks - 1 - rank]]
    return torch.cat(parts)


def sum_over_context(x: Tensor, grid: Grid) -> Tensor:
    """The sum of every context-parallel rank's `x`, on all of them, for a loss that needs whole documents.

    All ranks then compute the same loss. Each owns 1/C of it (the caller divides by C), so that sums over ranks count it
    once; the gradient of the whole is then C times that of the own share.
    """
    return _SumOverContext.apply(x, grid.context) if grid.context.size > 1 else x  # pyright: ignore[reportReturnType]


class _SumOverContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Any) -> Tensor:  # pyright: ignore
        ctx.size = axis.size
        total = x.clone()
        dist.all_reduce(total, group=axis.group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        return grad * ctx.size, None

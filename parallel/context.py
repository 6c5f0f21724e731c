"""Packed rows as megatron wants them, and a rank's part of them under context parallelism."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megalign.parallel.grid import Grid


@dataclass
class SharedPrefixes(PackedSeqParams):
    """A packed row in which a document may see, before its own tokens, the first tokens of the document before it."""

    runs: list[slice] = field(default_factory=list)  # of the row's tokens: the keys of all documents, end to end
    keys: list[int] = field(default_factory=list)  # how many each document sees


def packed_sequences(cu_seqlens: Tensor, max_seqlen: int, prefixes: Sequence[int] | None = None) -> PackedSeqParams:
    """Boundaries of the documents of a packed row. cu_seqlens: int32 [n + 1], before context parallelism.

    prefixes: tokens that each document shares with the front of the one before it (`megalign.batch`); None: none does.
    """
    sizes: dict[str, Any] = dict(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=max_seqlen, max_seqlen_kv=max_seqlen)
    if prefixes is None:
        return PackedSeqParams(**sizes)
    bounds = cu_seqlens.tolist()
    runs, keys = [], []
    for i, (start, end, prefix) in enumerate(zip(bounds[:-1], bounds[1:], prefixes, strict=True)):
        if prefix:
            runs.append(slice(bounds[i - 1], bounds[i - 1] + prefix))
        runs.append(slice(start, end))
        keys.append(prefix + end - start)
    return SharedPrefixes(**sizes, runs=runs, keys=keys)


def gather_runs(x: Tensor, runs: Sequence[slice]) -> Tensor:
    """`runs` of x's rows, end to end; a row of several runs gets the sum of their gradients."""
    return _GatherRuns.apply(x, runs)  # pyright: ignore[reportReturnType]


class _GatherRuns(torch.autograd.Function):
    """Indexing with a tensor would add its gradients up row by row; runs are few and long."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, runs: Sequence[slice]) -> Tensor:  # pyright: ignore
        ctx.runs, ctx.shape = runs, x.shape
        return torch.cat([x[run] for run in runs])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        total = grad.new_zeros(ctx.shape)
        for run, part in zip(ctx.runs, grad.split([run.stop - run.start for run in ctx.runs])):
            total[run] += part
        return total, None


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

"""Packed rows as megatron wants them, and a rank's part of them under context parallelism."""

from __future__ import annotations

import torch
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

"""One packed microbatch through one model chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megalign.batch import Ahead, Batch, look_ahead
from megalign.parallel.context import context_part, packed_sequences
from megalign.parallel.grid import Grid
from megalign.parallel.init import device


def scored_logprobs(chunk: Any, batch: Batch, grid: Grid) -> Tensor:
    """Last stage: [2, N] as `DialogueModel` gives them; earlier stages: hidden states for the next one."""
    return _forward(chunk, batch, grid, ())


def logprobs_ahead(chunk: Any, batch: Batch, grid: Grid, depths: int) -> Any:
    """`scored_logprobs`, and besides those of the prediction modules: on the last stage [[2, N], [2, N_1], ... [2, N_depths]].

    N_k counts the scored tokens whose document has a token k before them. Earlier stages: hidden states.
    """
    ahead = [look_ahead(batch, depth) for depth in range(1, depths + 1)]
    return _forward(chunk, batch, grid, [_part_of(shifted, batch, grid) for shifted in ahead])


def head_values(chunk: Any, batch: Batch, grid: Grid) -> Tensor:
    """Last stage of a reward model: [documents of this rank, H], read at the last real token of each; else hidden states."""
    return _forward(chunk, batch, grid, (), batch.last_tokens)


def read_by(chunk: Any, batch: Batch, grid: Grid, head: Callable[[Tensor, Tensor, Tensor, Batch], Tensor]) -> Any:
    """Last stage: what `head` makes of the scored positions, the output table and the labels (see `DialogueModel.forward`); else hidden states."""
    return _forward(chunk, batch, grid, (), head=lambda hidden, weight, labels: head(hidden, weight, labels, batch))


def _forward(chunk: Any, batch: Batch, grid: Grid, ahead: Any, marked: Tensor | None = None, head: Any = None) -> Any:
    to, read = device(), {} if head is None else {"head": head}
    packed = packed_sequences(batch.cu_seqlens.to(to), batch.max_seqlen, batch.prefixes)
    tokens, positions, labels, mask, padding = (
        context_part(x, batch.cu_seqlens, grid).to(to)[None]
        for x in (batch.tokens, batch.position_ids, batch.labels, batch.loss_mask if marked is None else marked, batch.padding)
    )
    return chunk(tokens, positions, None, labels=labels, loss_mask=mask, padding_mask=padding, packed_seq_params=packed, ahead=ahead, **read)


def _part_of(shifted: Ahead, batch: Batch, grid: Grid) -> Ahead:
    """This rank's part, as [1, T]. The shift came first, so that context parallelism has nothing to exchange."""
    parts = (shifted.tokens, shifted.labels, shifted.loss_mask, shifted.padding)
    return Ahead(*(context_part(x, batch.cu_seqlens, grid).to(device())[None] for x in parts))

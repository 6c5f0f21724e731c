"""One packed microbatch through one model chunk."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megalign.batch import Batch
from megalign.parallel.context import context_part, packed_sequences
from megalign.parallel.grid import Grid
from megalign.parallel.init import device


def scored_logprobs(chunk: Any, batch: Batch, grid: Grid) -> Tensor:
    """Last stage: [2, N] as `DialogueModel` gives them; earlier stages: hidden states for the next one."""
    to = device()
    packed = packed_sequences(batch.cu_seqlens.to(to), batch.max_seqlen)
    tokens, positions, labels, mask, padding = (
        context_part(x, batch.cu_seqlens, grid).to(to)[None]
        for x in (batch.tokens, batch.position_ids, batch.labels, batch.loss_mask, batch.padding)
    )
    return chunk(tokens, positions, None, labels=labels, loss_mask=mask, padding_mask=padding, packed_seq_params=packed)

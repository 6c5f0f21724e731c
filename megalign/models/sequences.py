"""From log-probabilities of scored tokens to those of whole documents of a packed batch."""

from __future__ import annotations

import torch
from torch import Tensor

from megalign.batch import Batch
from megalign.parallel.context import context_part, sum_over_context
from megalign.parallel.grid import Grid


def sequence_logprobs(output_2N: Tensor, batch: Batch, grid: Grid) -> Tensor:
    """[documents] sum of log p over each document's scored tokens, FP32, in the order of the batch.

    output_2N: what `scored_logprobs` returns on the last stage. Under context parallelism every rank has the whole sums
    (see `sum_over_context`). Added up in float64: in any order the same FP32 number comes out, but for rare halves.
    """
    documents = batch.documents
    number = torch.full((len(batch.cu_seqlens) - 1,), len(documents))  # of each segment; padding has one past the last
    number[documents] = torch.arange(len(documents))
    document_T = torch.repeat_interleave(number, batch.cu_seqlens.diff().long())
    document_N = context_part(document_T, batch.cu_seqlens, grid)[context_part(batch.loss_mask, batch.cu_seqlens, grid)]
    logprobs = output_2N[0]
    sums = logprobs.new_zeros(len(documents), dtype=torch.float64)
    return sum_over_context(sums.index_add(0, document_N.to(logprobs.device), logprobs.double()), grid).float()


def document_values(values_nH: Tensor, batch: Batch, grid: Grid) -> Tensor:
    """[documents, H] of each document, in the order of the batch, from those that this rank has read (`head_values`).

    Under context parallelism the last token of a document lies on one rank; every rank gets all (see `sum_over_context`).
    """
    marked = context_part(batch.last_tokens, batch.cu_seqlens, grid)
    if grid.context.size == 1:
        return values_nH
    numbers = batch.last_tokens.long().cumsum(0) - 1  # of the document that a marked position ends
    own = context_part(numbers, batch.cu_seqlens, grid)[marked].to(values_nH.device)
    whole = values_nH.new_zeros(int(batch.last_tokens.sum()), values_nH.shape[-1])
    return sum_over_context(whole.index_add(0, own, values_nH), grid)


def sequence_tokens(batch: Batch) -> Tensor:
    """[documents] scored tokens of each, at least 1 for division."""
    ends = batch.loss_mask.long().cumsum(0)
    totals = torch.cat([ends.new_zeros(1), ends])[batch.cu_seqlens.long()].diff()
    return totals[batch.documents].clamp(min=1)

"""The scalar of a microbatch: an algorithm's loss, and beside it that of the prediction modules.

    L = sum of token losses / N  +  scale / D * sum over modules k of (- sum of log p_k) / N_k

N: scored tokens of the global batch; N_k: those whose document has a token k before them, which module k is scored
on. DeepSeek-V3's eq. 24 and 25 (arXiv:2412.19437), but for the denominator: they divide by the length of a sequence
that is one long document, where N and N_k are nearly the same. In short documents they are not, and a mean over
what is scored is what `loss` reports too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalign.batch import Batch, look_ahead
from megalign.losses import Loss
from megalign.parallel.grid import Grid
from megalign.parallel.init import device
from megalign.parallel.schedule import rescale_for_megatron, sum_over


@dataclass(frozen=True)
class Denominators:
    """Scored tokens of the global batch, the same on every rank, each at least 1."""

    tokens: float
    ahead: list[float]  # of each prediction module


def denominators(microbatches: Sequence[Batch], depths: int, grid: Grid) -> Denominators:
    """Counted before the first forward (collective over data-parallel ranks). depths: 0 without prediction modules."""
    counts = [[int(batch.loss_mask.sum()), *(int(look_ahead(batch, k + 1).loss_mask.sum()) for k in range(depths))] for batch in microbatches]
    local = torch.tensor(counts, dtype=torch.float64).sum(0).to(device())
    total = sum_over(local, grid.data.group).clamp(min=1.0).tolist()
    return Denominators(total[0], total[1:])


def objective(
    loss: Loss, ahead: Sequence[Tensor], counts: Denominators, scale: float, num_microbatches: int, grid: Grid
) -> tuple[Tensor, dict[str, Tensor]]:
    """(what megatron differentiates, sums to be divided by `counts.tokens` and logged).

    ahead: [2, N_k] of each prediction module, as `DialogueModel` returns them. Metrics: `loss` is the algorithm's own,
    `mtp_k_loss` and `mtp_k_accuracy` those of module k, as means over N_k.
    """
    scalar = rescale_for_megatron(loss.sum, counts.tokens, num_microbatches, grid)
    metrics = {"loss": loss.sum.detach(), **loss.metrics}
    for k, ((logprobs, correct), count) in enumerate(zip(ahead, counts.ahead, strict=True), 1):
        scalar = scalar + rescale_for_megatron(-logprobs.sum(), count, num_microbatches, grid) * (scale / len(ahead))
        metrics[f"mtp_{k}_loss"] = -logprobs.detach().sum() * (counts.tokens / count)
        metrics[f"mtp_{k}_accuracy"] = correct.detach().sum() * (counts.tokens / count)
    return scalar, metrics

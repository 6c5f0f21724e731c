"""What training makes small, and the scalar of a microbatch: an algorithm's loss, and beside it that of the prediction modules.

    L = sum of losses / C  +  scale / D * sum over modules k of (- sum of log p_k) / N_k

C: what the algorithm counts in the global batch, N scored tokens in supervised training, pairs in preference optimisation; N_k: those whose document has a token k before them, which module k is scored
on. DeepSeek-V3's eq. 24 and 25 (arXiv:2412.19437), but for the denominator: they divide by the length of a sequence
that is one long document, where N and N_k are nearly the same. In short documents they are not, and a mean over
what is scored is what `loss` reports too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalign.batch import Ahead, Batch, look_ahead
from megalign.losses import Loss
from megalign.parallel.grid import Grid
from megalign.parallel.init import device
from megalign.parallel.schedule import rescale_for_megatron, sum_over


def scored_tokens(batch: Batch | Ahead) -> float:
    """Tokens of a microbatch that are scored."""
    return float(batch.loss_mask.sum())


Head = Callable[[Tensor, Tensor, Tensor, Batch], Tensor]  # (scored positions [N, D], this rank's rows [v, D] of the table, labels [N], batch)


@dataclass(frozen=True)
class Objective:
    """Sum of losses / sum of counts, both over the whole global batch."""

    loss: Callable[[Tensor, Batch], Loss]  # of what the last stage returned for a microbatch
    count: Callable[[Batch], float] = scored_tokens  # what the loss sums over: known before the forward, on every stage
    predict_ahead: bool = True  # train the model's prediction modules on the same tokens
    head: Head | None = None  # what the last stage returns in the place of log-probabilities
    prepare: Callable[[Sequence[Batch]], None] | None = None  # of a step's microbatches, e.g. what a reference says of them


@dataclass(frozen=True)
class Denominators:
    """Of the global batch, the same on every rank; nothing to score counts as 1."""

    count: float  # of what the objective sums over
    tokens: float  # scored
    ahead: list[float]  # scored tokens of each prediction module


def denominators(microbatches: Sequence[Batch], count: Callable[[Batch], float], depths: int, grid: Grid) -> Denominators:
    """Counted before the first forward (collective over data-parallel ranks). depths: 0 without prediction modules."""
    counts = [[count(batch), scored_tokens(batch), *(scored_tokens(look_ahead(batch, k + 1)) for k in range(depths))] for batch in microbatches]
    local = torch.tensor(counts, dtype=torch.float64).sum(0).to(device())
    total = [value or 1.0 for value in sum_over(local, grid.data.group).tolist()]
    return Denominators(total[0], total[1], total[2:])


def scalar_and_sums(
    loss: Loss, ahead: Sequence[Tensor], counts: Denominators, scale: float, num_microbatches: int, grid: Grid
) -> tuple[Tensor, dict[str, Tensor]]:
    """(what megatron differentiates, sums to log: over `counts.count`, or over the sum whose name has a # behind).

    ahead: [2, N_k] of each prediction module, as `DialogueModel` returns them. Metrics: `loss` is the algorithm's own,
    `mtp_k_loss` and `mtp_k_accuracy` those of module k, as means over N_k.
    """
    scalar = rescale_for_megatron(loss.sum, counts.count, num_microbatches, grid)
    ratios = {f"{name}{mark}": value for name, ratio in loss.ratios.items() for mark, value in zip(("", "#"), ratio)}
    metrics = {"loss": loss.sum.detach(), **loss.metrics, **ratios}
    for k, ((logprobs, correct), count) in enumerate(zip(ahead, counts.ahead, strict=True), 1):
        scalar = scalar + rescale_for_megatron(-logprobs.sum(), count, num_microbatches, grid) * (scale / len(ahead))
        metrics[f"mtp_{k}_loss"] = -logprobs.detach().sum() * (counts.count / count)
        metrics[f"mtp_{k}_accuracy"] = correct.detach().sum() * (counts.count / count)
    return scalar, metrics

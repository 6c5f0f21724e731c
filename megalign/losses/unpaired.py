"""Losses on single answers that are desirable or not.

# N answers; log-ratios are summed over an answer's scored tokens, FP32
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalign.losses.loss import AnswerLoss


def kto_baseline(kl_logprobs_N: Tensor, kl_ref_logprobs_N: Tensor) -> Tensor:
    """z = max(0, mean log pi/pi_ref) over answers that do not belong to their prompts; a constant (arXiv:2402.01306, sec. 4.1).

    An estimate of KL(pi || pi_ref); with a single row there is no mismatched answer, and z is not defined.
    """
    return (kl_logprobs_N - kl_ref_logprobs_N).detach().mean().clamp(min=0)


def kto_loss(
    logprobs_N: Tensor,
    ref_logprobs_N: Tensor,
    desirable_N: Tensor,
    baseline: Tensor | float,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    weights_N: Tensor | None = None,
) -> AnswerLoss:
    """w_d (1 - sigma(beta (r - z))) for desirable, w_u (1 - sigma(beta (z - r))) for others (arXiv:2402.01306, eq. 7).

    r = log pi/pi_ref; baseline: z, see `kto_baseline`. As in TRL the sum is over all answers, not over each kind.
    """
    ratios = logprobs_N - ref_logprobs_N
    wanted = desirable_N.to(ratios)
    kind_weights = desirable_weight * wanted + undesirable_weight * (1 - wanted)
    losses = kind_weights * torch.sigmoid(-beta * (2 * wanted - 1) * (ratios - baseline))
    return _answer_loss(losses, beta * ratios, logprobs_N, desirable_N, weights_N)


def apo_zero_unpaired_loss(
    logprobs_N: Tensor,
    ref_logprobs_N: Tensor,
    desirable_N: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    weights_N: Tensor | None = None,
) -> AnswerLoss:
    """w_d (1 - sigma(beta r)) for desirable answers, w_u sigma(beta r) for others (arXiv:2408.06266, eq. 7, unpaired): KTO with z = 0."""
    return kto_loss(
        logprobs_N,
        ref_logprobs_N,
        desirable_N,
        0.0,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        weights_N=weights_N,
    )


def _answer_loss(losses: Tensor, rewards: Tensor, logprobs: Tensor, desirable: Tensor, weights: Tensor | None) -> AnswerLoss:
    """TRL's KTO metrics: means over the desirable answers as chosen, over the others as rejected."""
    w = torch.ones_like(losses) if weights is None else weights.to(losses)
    ratios = {}
    for side, mask in (("chosen", desirable), ("rejected", ~desirable)):
        share = w * mask
        for name, values in (("rewards", rewards), ("logps", logprobs)):
            ratios[f"{name}/{side}"] = ((share * values.detach()).sum(), share.sum())
    return AnswerLoss((w * losses).sum(), w.sum(), {}, ratios)

"""Losses of reward models and predictors of what users do: scores in, sums out.

# N answers, P pairs, C classes
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, softplus

from megalign.losses.loss import AnswerLoss, PairLoss
from megalign.losses.preference import log1mexp


def bradley_terry_loss(
    chosen_P: Tensor,
    rejected_P: Tensor,
    *,
    margin_P: Tensor | float = 0.0,
    label_smoothing: float = 0.0,
    centering: float = 0.0,
    weights_P: Tensor | None = None,
) -> PairLoss:
    """-log sigma(r_chosen - r_rejected - margin), a share `label_smoothing` of the labels taken as flipped.

    Bradley and Terry 1952; margin: arXiv:2307.09288, eq. 2. centering: weight of (r_chosen + r_rejected)^2, which keeps
    the mean reward near 0 (arXiv:2312.09244, eq. 2). log 2 for equal rewards.
    """
    difference = chosen_P - rejected_P
    logits = difference - margin_P
    losses = -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)
    losses = losses + centering * (chosen_P + rejected_P).square()
    w = torch.ones_like(losses) if weights_P is None else weights_P.to(losses)
    metrics = {"accuracy": (difference > 0).to(losses), "margin": difference, "mean_reward": (chosen_P + rejected_P) / 2}
    return PairLoss((w * losses).sum(), w.sum(), {name: (w * value.detach()).sum() for name, value in metrics.items()})


def regression_loss(scores_N: Tensor, targets_N: Tensor, *, weights_N: Tensor | None = None) -> AnswerLoss:
    """(score - target)^2: pointwise rewards, future turns."""
    error = scores_N - targets_N
    metrics = {"mean_reward": scores_N, "absolute_error": error.abs()}
    return _summed(error.square(), metrics, weights_N)


def ordered_thresholds(free_K: Tensor) -> Tensor:
    """K increasing thresholds from K free numbers: the first, then positive steps softplus(free)."""
    return torch.cat([free_K[:1], free_K[:1] + softplus(free_K[1:]).cumsum(0)])


def ordinal_loss(scores_N: Tensor, thresholds_K: Tensor, labels_N: Tensor, *, weights_N: Tensor | None = None) -> AnswerLoss:
    """-log P(y) of ratings 0 to K, P(y <= k) = sigma(threshold_k - score) (proportional odds, McCullagh 1980).

    thresholds_K: increasing (`ordered_thresholds`). sigma(b) - sigma(a) = sigma(b) sigma(-a) (1 - exp(a - b)), so that
    nothing is subtracted that is nearly equal.
    """
    infinite = thresholds_K.new_full((1,), torch.inf)
    edges = torch.cat([-infinite, thresholds_K, infinite])
    lower, upper = edges[labels_N], edges[labels_N + 1]
    first, last = torch.isinf(lower), torch.isinf(upper)
    # The outermost classes have one finite edge; the other is put where its factor is 1 and has no gradient.
    below = torch.where(first, 0.0, logsigmoid(scores_N - torch.where(first, 0.0, lower)))
    above = torch.where(last, 0.0, logsigmoid(torch.where(last, 0.0, upper) - scores_N))
    outermost = first | last
    gap = torch.where(outermost, 0.0, log1mexp(torch.where(outermost, -1.0, lower - upper)))
    predicted = (scores_N.detach()[:, None] > thresholds_K.detach()).sum(-1)
    return _summed(-(below + above + gap), {"accuracy": (predicted == labels_N).to(scores_N)}, weights_N)


def classification_loss(logits_NC: Tensor, labels_N: Tensor, *, label_smoothing: float = 0.0, weights_N: Tensor | None = None) -> AnswerLoss:
    """-log softmax(logits)[label]; label_smoothing spreads that share over all C classes."""
    losses = cross_entropy(logits_NC, labels_N, reduction="none", label_smoothing=label_smoothing)
    return _summed(losses, {"accuracy": (logits_NC.argmax(-1) == labels_N).to(losses)}, weights_N)


def binary_loss(logits_N: Tensor, labels_N: Tensor, *, weights_N: Tensor | None = None) -> AnswerLoss:
    """-log sigma(+-logit): does the user go on, does the user return. labels_N: bool."""
    losses = -logsigmoid(torch.where(labels_N, logits_N, -logits_N))
    return _summed(losses, {"accuracy": ((logits_N > 0) == labels_N).to(losses)}, weights_N)


def exponential_survival_loss(log_scale_N: Tensor, times_N: Tensor, observed_N: Tensor, *, weights_N: Tensor | None = None) -> AnswerLoss:
    """-log likelihood of times to an event, some of which are censored: the event had not come by then.

    t exponential with mean s = exp(log_scale): -log f(t) = log s + t / s if observed, -log P(T > t) = t / s if not.
    times_N: > 0, any unit, which is that of s.
    """
    losses = times_N * torch.exp(-log_scale_N) + torch.where(observed_N, log_scale_N, 0.0)
    return _summed(losses, {"mean_scale": log_scale_N.exp()}, weights_N)


def weibull_survival_loss(
    log_scale_N: Tensor, log_shape: Tensor, times_N: Tensor, observed_N: Tensor, *, weights_N: Tensor | None = None
) -> AnswerLoss:
    """The same with a Weibull time: scale s, shape k (k = 1 is exponential; k < 1: the longer away, the less likely back).

    -log f = -log k + log s - (k - 1) (log t - log s) + (t / s)^k if observed; -log P(T > t) = (t / s)^k if not.
    log_shape: [N] or a scalar.
    """
    shape = log_shape.exp()
    log_time = times_N.log() - log_scale_N
    hazard = log_shape + (shape - 1) * log_time - log_scale_N
    losses = torch.exp(shape * log_time) - torch.where(observed_N, hazard, 0.0)
    return _summed(losses, {"mean_scale": log_scale_N.exp()}, weights_N)


def _summed(losses: Tensor, metrics: dict[str, Tensor], weights: Tensor | None) -> AnswerLoss:
    w = torch.ones_like(losses) if weights is None else weights.to(losses)
    return AnswerLoss((w * losses).sum(), w.sum(), {name: (w * value.detach()).sum() for name, value in metrics.items()})

"""A head by its loss: its sizes, its loss on a microbatch, and what its numbers mean.

# N documents of a microbatch, P pairs, H numbers of all heads
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from megalign.config.schema import HeadConfig
from megalign.data.labels import OBSERVED
from megalign.losses import reward as losses
from megalign.losses.loss import Loss
from megalign.models.heads import HeadShape

Heads = Mapping[str, HeadConfig]
PAIRED, TIMES = "bradley_terry", ("exponential", "weibull")


def shape_of(head: HeadConfig) -> HeadShape:
    """A bias would cancel out of every pair, so bradley_terry has none (and TRL's score layer neither)."""
    classes = head.classes or 0
    match head.loss:
        case "bradley_terry":
            return HeadShape(1, bias=False)
        case "classification":
            return HeadShape(classes, bias=True)
        case "ordinal":
            return HeadShape(1, bias=False, constants=classes - 1)  # the thresholds move, so the score need not
        case "weibull":
            return HeadShape(1, bias=True, constants=1)
        case _:
            return HeadShape(1, bias=True)


def shapes_of(heads: Heads) -> dict[str, HeadShape]:
    """Of all heads, in their order."""
    return {name: shape_of(head) for name, head in heads.items()}


def columns_of(heads: Heads) -> dict[str, slice]:
    """Where each head's numbers stand among the H."""
    found, start = {}, 0
    for name, shape in shapes_of(heads).items():
        found[name] = slice(start, start + shape.width)
        start += shape.width
    return found


# -- the loss of a microbatch --------------------------------------------------------------------------


def facts_of(values: Mapping[str, Tensor], heads: Heads, device: torch.device) -> dict[str, Tensor]:
    """A batch's values; of one that is all padding, as many as no documents have."""
    names = ("weight", "side", "margin", *heads, *(name + OBSERVED for name, head in heads.items() if head.loss in TIMES))
    return {name: values[name].to(device) if values else torch.zeros(0, dtype=torch.float64, device=device) for name in names}


def head_loss(name: str, head: HeadConfig, values_NW: Tensor, facts: Mapping[str, Tensor]) -> Loss:
    """Sum of the head's losses over the documents (bradley_terry: the pairs) whose label is known.

    values_NW: the head's own numbers. facts: the `values` of the batch's documents (`megalign.data.judgements`).
    """
    if head.loss == PAIRED:
        return _pair_loss(head, values_NW[:, 0], facts[name], facts)
    known = ~torch.isnan(facts[name])
    observed = facts[name + OBSERVED][known].bool() if name + OBSERVED in facts else known[known]
    return _ANSWER_LOSSES[head.loss](values_NW[known], facts[name][known].to(values_NW), observed, head, facts["weight"][known].to(values_NW))


def head_count(name: str, head: HeadConfig, facts: Mapping[str, Tensor]) -> Tensor:
    """What `head_loss` sums over: known before the forward."""
    known = ~torch.isnan(facts[name])
    if head.loss == PAIRED:
        known &= facts["side"] > 0
    return facts["weight"][known].sum()


def _pair_loss(head: HeadConfig, rewards_N: Tensor, labels_N: Tensor, facts: Mapping[str, Tensor]) -> Loss:
    chosen, rejected = facts["side"] > 0, facts["side"] < 0
    known = ~torch.isnan(labels_N[chosen])
    first, second, label = rewards_N[chosen][known], rewards_N[rejected][known], labels_N[chosen][known]
    as_judged = label > 0  # else by this head's measure the second answer is the better one
    better, worse = torch.where(as_judged, first, second), torch.where(as_judged, second, first)
    margin = head.margin * facts["margin"][chosen][known].to(rewards_N)
    weights = facts["weight"][chosen][known].to(rewards_N)
    return losses.bradley_terry_loss(
        better, worse, margin_P=margin, label_smoothing=head.label_smoothing, centering=head.centering, weights_P=weights
    )


def _regression(values: Tensor, labels: Tensor, observed: Tensor, head: HeadConfig, weights: Tensor) -> Loss:
    return losses.regression_loss(values[:, 0], labels.log1p() if head.scale == "log1p" else labels, weights_N=weights)


def _binary(values: Tensor, labels: Tensor, observed: Tensor, head: HeadConfig, weights: Tensor) -> Loss:
    return losses.binary_loss(values[:, 0], labels > 0, weights_N=weights)


def _classification(values: Tensor, labels: Tensor, observed: Tensor, head: HeadConfig, weights: Tensor) -> Loss:
    return losses.classification_loss(values, labels.long(), label_smoothing=head.label_smoothing, weights_N=weights)


def _ordinal(values: Tensor, labels: Tensor, observed: Tensor, head: HeadConfig, weights: Tensor) -> Loss:
    # Every document carries the same thresholds: their mean, and the gradient reaches each copy.
    thresholds = losses.ordered_thresholds(values[:, 1:].sum(0) / max(1, len(values)))
    return losses.ordinal_loss(values[:, 0], thresholds, labels.long(), weights_N=weights)


def _exponential(values: Tensor, labels: Tensor, observed: Tensor, head: HeadConfig, weights: Tensor) -> Loss:
    return losses.exponential_survival_loss(values[:, 0], labels, observed, weights_N=weights)


def _weibull(values: Tensor, labels: Tensor, observed: Tensor, head: HeadConfig, weights: Tensor) -> Loss:
    return losses.weibull_survival_loss(values[:, 0], values[:, 1], labels, observed, weights_N=weights)


_ANSWER_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, HeadConfig, Tensor], Loss]] = {
    "regression": _regression,
    "binary": _binary,
    "classification": _classification,
    "ordinal": _ordinal,
    "exponential": _exponential,
    "weibull": _weibull,
}

# -- what the numbers mean -----------------------------------------------------------------------------


def reading(head: HeadConfig, values_NW: np.ndarray) -> np.ndarray:
    """[N] one number a document, on the scale of the labels.

    bradley_terry: the reward; regression: the number; binary: the probability; classification: the most probable class;
    ordinal: the expected rating; exponential, weibull: the expected time.
    """
    first = values_NW[:, 0]
    match head.loss:
        case "regression":
            return np.expm1(first) if head.scale == "log1p" else first
        case "binary":
            return _sigmoid(first)
        case "classification":
            return values_NW.argmax(-1).astype(np.float64)
        case "ordinal":
            # E y = sum over k of P(y > k)
            return np.sum([_sigmoid(first - threshold) for threshold in thresholds_of(values_NW)], 0) if len(first) else first
        case "exponential":
            return np.exp(first)
        case "weibull":
            return np.exp(first) * np.array([math.gamma(1 + math.exp(-shape)) for shape in values_NW[:, 1]])
        case _:
            return first


def thresholds_of(values_NW: np.ndarray) -> list[float]:
    """Thresholds of an ordinal head."""
    return losses.ordered_thresholds(torch.tensor(values_NW[0, 1:], dtype=torch.float64)).tolist()


def probabilities(head: HeadConfig, values_NC: np.ndarray) -> np.ndarray:
    """[N, C] of a classification head."""
    shifted = np.exp(values_NC - values_NC.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))

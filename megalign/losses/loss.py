"""What every loss returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Loss:
    """`sum` (scalar with gradient) over `count` things, and what to log of them (no gradient).

    metrics: sums over the same things; the trainer divides loss and metrics by the count of the whole global batch.
    ratios: (sum, count) where a metric counts something else; sums of both are divided. A name that begins with an
    underscore is for monitors and not for the log.
    """

    sum: Tensor
    count: Tensor | float
    metrics: dict[str, Tensor]
    ratios: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class TokenLoss(Loss):
    """A loss over scored tokens."""


class PairLoss(Loss):
    """A loss over pairs of a chosen and a rejected answer."""


class AnswerLoss(Loss):
    """A loss over single answers."""

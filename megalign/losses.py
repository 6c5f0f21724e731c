"""Losses as pure functions: log-probabilities in, a sum and what to log out.

Nothing here knows of ranks, microbatches or configuration. A loss is returned as a SUM over what it counts,
because only the trainer knows the global denominator.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TokenLoss:
    """A loss over tokens: `sum` (FP32 scalar with gradient), `count` tokens, and sums of metrics over them."""

    sum: Tensor
    count: int
    metrics: dict[str, Tensor]


def cross_entropy_loss(logprobs_N: Tensor, correct_N: Tensor) -> TokenLoss:
    """-sum of log p(token | tokens before), over the N scored tokens.

    logprobs_N: FP32, <= 0. correct_N: 1 where the token was the most probable one (mean_token_accuracy).
    """
    return TokenLoss(-logprobs_N.sum(), logprobs_N.numel(), {"mean_token_accuracy": correct_N.detach().sum()})

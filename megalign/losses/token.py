"""Losses over tokens."""

from __future__ import annotations

from torch import Tensor

from megalign.losses.loss import TokenLoss


def cross_entropy_loss(logprobs_N: Tensor, correct_N: Tensor) -> TokenLoss:
    """-sum of log p(token | tokens before), over the N scored tokens.

    logprobs_N: FP32, <= 0. correct_N: 1 where the token was the most probable one (mean_token_accuracy).
    """
    return TokenLoss(-logprobs_N.sum(), logprobs_N.numel(), {"mean_token_accuracy": correct_N.detach().sum()})

"""Losses as pure functions: log-probabilities, scores or logits in, a sum and what to log out.

Nothing here knows of ranks, microbatches or configuration. A loss is a SUM over what it counts, because only the
trainer knows the global denominator.
"""

from megalign.losses.loss import Loss, TokenLoss
from megalign.losses.token import cross_entropy_loss

__all__ = ["Loss", "TokenLoss", "cross_entropy_loss"]

"""What the losses on pairs of answers take and give.

# P pairs; all tensors [P], log-probabilities are sums over the scored tokens of an answer, FP32
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megalign.losses.loss import PairLoss


@dataclass(frozen=True)
class Pairs:
    """log p of the chosen and the rejected answer under the policy and, where there is one, the reference."""

    chosen_P: Tensor
    rejected_P: Tensor
    chosen_tokens_P: Tensor  # scored tokens, >= 1
    rejected_tokens_P: Tensor
    ref_chosen_P: Tensor | None = None  # no gradient
    ref_rejected_P: Tensor | None = None

    @property
    def reference(self) -> tuple[Tensor, Tensor]:
        """log p of both answers under the reference. Raises ValueError without one."""
        if self.ref_chosen_P is None or self.ref_rejected_P is None:
            raise ValueError("this loss compares with a reference, but ref_chosen_P or ref_rejected_P is None; give both, or take orpo, simpo or cpo")
        return self.ref_chosen_P, self.ref_rejected_P

    @property
    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """log pi/pi_ref of the chosen and of the rejected answers."""
        chosen, rejected = self.reference
        return self.chosen_P - chosen, self.rejected_P - rejected

    @property
    def delta(self) -> Tensor:
        """Difference of the log-ratios: how much more the policy prefers the chosen answer than the reference does."""
        chosen, rejected = self.log_ratios
        return chosen - rejected

    @property
    def chosen_nll(self) -> Tensor:
        """-log p of a chosen token, mean over each answer's own tokens."""
        return -self.chosen_P / self.chosen_tokens_P

    def per_token(self) -> Pairs:
        """The same with every sum divided by its answer's scored tokens."""

        def mean(total: Tensor | None, tokens: Tensor) -> Tensor | None:
            return None if total is None else total / tokens

        return replace(
            self,
            chosen_P=self.chosen_P / self.chosen_tokens_P,
            rejected_P=self.rejected_P / self.rejected_tokens_P,
            ref_chosen_P=mean(self.ref_chosen_P, self.chosen_tokens_P),
            ref_rejected_P=mean(self.ref_rejected_P, self.rejected_tokens_P),
        )


@dataclass(frozen=True)
class PairTerms:
    """A loss a pair, and the rewards that the loss implies (no gradient)."""

    losses_P: Tensor
    chosen_rewards_P: Tensor
    rejected_rewards_P: Tensor

    def summed(self, pairs: Pairs, weights_P: Tensor | None = None) -> PairLoss:
        """sum_i w_i loss_i over sum_i w_i, with the metrics that TRL's users know, weighted alike.

        `_`-names are the moments from which the correlation of margin and length difference (O10) is made.
        """
        w = torch.ones_like(self.losses_P) if weights_P is None else weights_P.to(self.losses_P)
        margin = (self.chosen_rewards_P - self.rejected_rewards_P).detach()
        longer = (pairs.chosen_tokens_P - pairs.rejected_tokens_P).to(margin)
        metrics = {
            "rewards/chosen": self.chosen_rewards_P,
            "rewards/rejected": self.rejected_rewards_P,
            "rewards/margins": margin,
            "rewards/accuracies": (margin > 0).to(margin),
            "logps/chosen": pairs.chosen_P,
            "logps/rejected": pairs.rejected_P,
            **self._drift(pairs),
            "_margin*margin": margin * margin,
            "_longer": longer,
            "_longer*longer": longer * longer,
            "_margin*longer": margin * longer,
        }
        return PairLoss((w * self.losses_P).sum(), w.sum(), {name: (w * value.detach()).sum() for name, value in metrics.items()})

    @staticmethod
    def _drift(pairs: Pairs) -> dict[str, Tensor]:
        """How far the policy is from the reference on these answers: the mean of |log pi/pi_ref| over both, in nats."""
        if pairs.ref_chosen_P is None:
            return {}
        chosen, rejected = pairs.log_ratios
        return {"logps/drift": (chosen.abs() + rejected.abs()) / 2}

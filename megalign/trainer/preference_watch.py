"""Watchmen of preference optimisation: chosen answers that become less likely, rewards that follow length.

They look at means that the loop has anyway, keep the last steps, and are saved with a checkpoint.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from megalign.trainer.engine import StepResult
from megalign.trainer.guard import TrainingStopped

COLLAPSE = (
    "Why: the loss sees only the difference of the two answers. It falls as well when both become less likely, the rejected one faster; "
    "the probability they lose goes to answers that nobody has judged. Usual where both answers are much alike. "
    "What helps: dpo.loss=rpo (keeps the chosen answer likely), apo_zero or nca_pair; a larger dpo.beta; a lower optimizer.lr; fewer epochs."
)


LENGTH_FIX = "pairs balanced by length, dpo.loss=simpo or sigmoid_norm (log-probs per token), a length penalty"


class MarginCollapse:
    """Fires when log p of chosen answers has fallen by `nats` a pair while the loss fell and the margin grew (O9).

    Against the reference where there is one: then pairs of different lengths can be compared; else against the first steps.
    """

    def __init__(self, beta: float, *, has_reference: bool, nats: float = 2.0, window: int = 20, stop: bool = False):
        self.beta, self.has_reference, self.nats, self.window, self.stop = beta, has_reference, nats, window, stop
        self._first: list[tuple[float, float]] = []  # (log p or log-ratio of chosen, loss) of the first steps
        self._last: deque[tuple[float, float]] = deque(maxlen=window)
        self._fired = False

    def observe(self, step: int, result: StepResult) -> tuple[dict[str, float], list[str]]:
        """A warning the first time; raises TrainingStopped with `stop`."""
        chosen = result.metrics["rewards/chosen"] / self.beta if self.has_reference else result.metrics["logps/chosen"]
        row = (chosen, result.loss)
        if len(self._first) < self.window:
            self._first.append(row)
        self._last.append(row)
        if self._fired or len(self._last) < self.window or step < 2 * self.window:
            return {}, []
        (was, loss_was), (now, loss_now) = (tuple(sum(column) / len(rows) for column in zip(*rows)) for rows in (self._first, self._last))
        fallen = -now if self.has_reference else was - now
        if fallen <= self.nats or loss_now >= loss_was:
            return {}, []
        self._fired = True
        base = "under the reference" if self.has_reference else f"since the first {self.window} steps"
        message = f"chosen answers become less likely: log p has fallen by {fallen:.2f} nats a pair {base} while the loss fell from {loss_was:.4f} to {loss_now:.4f}. {COLLAPSE}"
        if self.stop:
            raise TrainingStopped(message, step, fix="dpo.on_collapse=warn goes on regardless")
        return {}, [message]

    def state_dict(self) -> dict[str, Any]:
        return {"first": self._first, "last": list(self._last), "fired": self._fired}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._first = [tuple(row) for row in state["first"]]
        self._last = deque((tuple(row) for row in state["last"]), maxlen=self.window)
        self._fired = state["fired"]


class RewardMargin:
    """Mean reward of desirable answers less that of the others, where a step has both (as TRL's KTOTrainer logs it)."""

    def observe(self, step: int, result: StepResult) -> tuple[dict[str, float], list[str]]:
        """`rewards/margins`."""
        names = ("rewards/chosen", "rewards/rejected")
        if not all(name in result.metrics for name in names):
            return {}, []
        return {"rewards/margins": result.metrics[names[0]] - result.metrics[names[1]]}, []

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class LengthBias:
    """Correlation over recent pairs of reward margin and length difference (O10); a warning once it is past `limit`.

    r = cov(m, d) / sqrt(var(m) var(d)), m the margin, d = chosen tokens - rejected tokens; a warning needs 3 standard
    errors, 3 / sqrt(pairs), as well.
    """

    def __init__(self, pairs_a_step: int, *, limit: float = 0.5, window: int = 20, margin: str = "rewards/margins", fix: str = LENGTH_FIX):
        """margin: the metric that follows length, or not. fix: what the warning advises."""
        self.pairs, self.limit, self.margin, self.fix = pairs_a_step, limit, margin, fix
        self._moments: deque[tuple[float, ...]] = deque(maxlen=window)
        self._fired = False

    def observe(self, step: int, result: StepResult) -> tuple[dict[str, float], list[str]]:
        """`rewards/length_correlation`, and a warning the first time."""
        names = (self.margin, "_longer", "_margin*margin", "_longer*longer", "_margin*longer")
        self._moments.append(tuple(result.metrics[name] for name in names))
        m, d, mm, dd, md = (sum(column) / len(column) for column in zip(*self._moments))
        variance = (mm - m * m) * (dd - d * d)
        if mm - m * m <= 1e-12 or dd - d * d <= 1e-12:
            return {}, []
        r = max(-1.0, min(1.0, (md - m * d) / math.sqrt(variance)))
        pairs = self.pairs * len(self._moments)
        said = []
        if not self._fired and len(self._moments) == self._moments.maxlen and abs(r) > max(self.limit, 3 / math.sqrt(pairs)):
            self._fired = True
            way = "longer" if r > 0 else "shorter"
            said = [
                f"reward margins follow length: correlation {r:+.2f} with the difference in tokens over {pairs} pairs, so the model learns that {way} is better. "
                f"What helps: {self.fix}"
            ]
        return {"rewards/length_correlation": r}, said

    def state_dict(self) -> dict[str, Any]:
        return {"moments": list(self._moments), "fired": self._fired}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._moments = deque((tuple(row) for row in state["moments"]), maxlen=self._moments.maxlen)
        self._fired = state["fired"]

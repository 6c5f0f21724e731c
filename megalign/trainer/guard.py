"""Watchmen of a run: loss spikes, permanent clipping, collapsed experts, non-finite gradients.

Each looks at numbers that the trainer has anyway and answers with a message or None; what to do
about it (stop, warn) is the trainer's decision. The two with a memory have `state_dict`, so a
resumed run fires at the same step as one that was never interrupted.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch

NEGLIGIBLE_SHARE = 0.1  # of the fair share 1/E: below it an expert counts as starved
ASSIGNMENTS_TO_JUDGE = 20  # an expert; with fewer, an empty expert may be chance


class TrainingStopped(Exception):
    """A guard ended the run. `cause` is what was seen, `fix` what to try; the rest says where."""

    def __init__(
        self,
        cause: str,
        step: int,
        microbatch: int | None = None,
        parameter: str | None = None,
        fix: str | None = None,
    ) -> None:
        super().__init__(
            cause, step, microbatch, parameter, fix
        )  # positional: it survives pickling between ranks
        self.cause = cause
        self.step = step
        self.microbatch = microbatch
        self.parameter = parameter
        self.fix = fix

    def __str__(self) -> str:
        where = f"training stopped at step {self.step}"
        if self.microbatch is not None:
            where += f", microbatch {self.microbatch}"
        if self.parameter is not None:
            where += f", parameter {self.parameter}"
        return f"{where}: {self.cause}" + (f"; {self.fix}" if self.fix else "")


class SpikeGuard:
    """Fires when a loss exceeds `factor` times the mean of the last `window` losses.

    It is silent until half the window is filled (the first steps of a run say little) and while the
    mean is not positive (a multiple of it would mean nothing). A loss that fires never enters the
    mean, so a plateau of spikes keeps firing. A non-finite loss always fires.
    """

    def __init__(self, factor: float, window: int = 50) -> None:
        if factor <= 1:
            raise ValueError(
                f"train.spike_factor = {factor} must be greater than 1, or null to switch it off"
            )
        if window < 2:
            raise ValueError(f"window = {window}: a running mean needs at least 2 losses")
        self.factor = factor
        self._losses: deque[float] = deque(maxlen=window)

    def observe(self, loss: float) -> str | None:
        """Message if this step's loss is a spike. Call once a step, in order."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        window = self._losses.maxlen or 0
        mean = sum(self._losses) / max(1, len(self._losses))
        if 2 * len(self._losses) >= window and mean > 0 and loss > self.factor * mean:
            return (
                f"the loss {loss:.4g} is {loss / mean:.3g} times the mean {mean:.4g} of the last "
                f"{len(self._losses)} steps (train.spike_factor = {self.factor:g})"
            )
        self._losses.append(loss)
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self._losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._losses = deque(state["losses"], maxlen=self._losses.maxlen)


class ClipAlarm:
    """Fires when more than `share` of the last `window` steps had their gradient clipped.

    Then the clip, not the learning rate, sets the size of every update. One message an episode: it
    is armed again once the share has fallen back to `share` or below.
    """

    def __init__(self, clip_grad: float, *, window: int = 100, share: float = 0.95) -> None:
        self.clip_grad = clip_grad
        self.share = share
        self._clipped: deque[bool] = deque(maxlen=window)
        self._fired = False

    def observe(self, grad_norm: float) -> str | None:
        """Message if clipping has become permanent. `grad_norm` is the norm before the clip."""
        if self.clip_grad <= 0:
            return None
        self._clipped.append(not grad_norm <= self.clip_grad)  # a NaN norm counts as clipped
        window, count = self._clipped.maxlen or 0, sum(self._clipped)
        always = len(self._clipped) == window and count > self.share * window
        fires, self._fired = always and not self._fired, always
        if not fires:
            return None
        return (
            f"the gradient was clipped in {count} of the last {window} steps (optimizer.clip_grad = "
            f"{self.clip_grad:g}, last norm {grad_norm:.3g}): the clip sets the step size; raise it, "
            "or lower optimizer.lr and lengthen optimizer.lr_warmup_steps"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"clipped": list(self._clipped), "fired": self._fired}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._clipped = deque(state["clipped"], maxlen=self._clipped.maxlen)
        self._fired = state["fired"]


def expert_collapse(
    expert_load: Sequence[Sequence[float]],
    *,
    negligible: float = NEGLIGIBLE_SHARE,
    assignments: float | None = None,
    layers: Sequence[int] | None = None,
) -> str | None:
    """Warning if some expert of some MoE layer is starved, None if all layers are alive.

    `expert_load[layer][expert]` is the share (or count) of token-to-expert assignments in a step, so
    top-k routing that collapsed onto k experts shows as k times 1/k. An expert is starved when its
    share is below `negligible / E`. The effective number of experts is exp(entropy of the shares).
    `assignments` (routed tokens times top-k, of one layer) silences the alarm where fewer than 20 an
    expert make empty experts a matter of chance. `layers`: numbers of the layers, where not all have experts.
    """
    worst: tuple[float, str] | None = None
    starving_layers = 0
    for layer, loads in zip(layers or range(len(expert_load)), expert_load, strict=True):
        experts, total = len(loads), sum(loads)
        if experts < 2 or not total > 0:
            continue
        if assignments is not None and assignments < ASSIGNMENTS_TO_JUDGE * experts:
            continue
        shares = [load / total for load in loads]
        starved = sum(share < negligible / experts for share in shares)
        if not starved:
            continue
        starving_layers += 1
        effective = math.exp(-sum(share * math.log(share) for share in shares if share > 0))
        if worst is None or effective / experts < worst[0]:
            message = (
                f"MoE layer {layer}: {starved} of {experts} experts get less than {negligible:.0%} of the fair "
                f"share 1/{experts} (smallest {min(shares):.2%}, largest {max(shares):.2%}; "
                f"{effective:.1f} experts do the work)"
            )
            worst = effective / experts, message
    if worst is None:
        return None
    more = f"; {starving_layers} layers are affected, this is the worst" if starving_layers > 1 else ""
    return f"{worst[1]}{more}; raise model.moe_aux_loss_coeff or lower optimizer.lr"


def describe_non_finite(named_tensors: Iterable[tuple[str, torch.Tensor | None]]) -> list[str]:
    """One line for each tensor that holds a NaN or an infinity, in the order given.

    Pass `(name, gradient)` pairs; a gradient of None is skipped.
    """
    lines = []
    for name, tensor in named_tensors:
        if tensor is None or bool(torch.isfinite(tensor).all()):
            continue
        nans = int(torch.isnan(tensor).sum())
        infinities = int(torch.isinf(tensor).sum())
        first = (~torch.isfinite(tensor)).nonzero()[0].tolist()
        lines.append(
            f"{name}: {nans} NaN, {infinities} infinite of {tensor.numel()} values, first at {first}"
        )
    return lines

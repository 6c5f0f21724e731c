"""The learning rate as a pure function of the step: nothing to save, nothing that can drift on resume."""

from __future__ import annotations

import math

STYLES = ("cosine", "linear", "constant", "cosine_with_restarts", "wsd")
WSD_STYLES = ("minus_sqrt", "linear", "cosine", "exponential")


def learning_rate(
    step: int,
    *,
    peak: float,
    minimum: float = 0.0,
    warmup: int = 0,
    total: int,
    style: str = "cosine",
    cycles: int = 1,
    wsd_decay_steps: int = 0,
    wsd_decay_style: str = "minus_sqrt",
) -> float:
    """Learning rate of optimizer step `step`, counted from 0.

    During warmup it is `peak * step / warmup`. Afterwards, with
    `p = (step - warmup) / (total - warmup)`, it is `minimum + (peak - minimum) * f(p)`:

        cosine                f = (1 + cos(pi p)) / 2                SGDR, arXiv 1608.03983, equation 5
        linear                f = 1 - p
        constant              f = 1 (also past the end)
        cosine_with_restarts  f = (1 + cos(pi (cycles * p mod 1))) / 2
        wsd                   f = 1, then over the last `wsd_decay_steps` (d from 0 to 1): warmup-stable-decay,
                              arXiv 2404.06395; minus_sqrt 1 - sqrt(d) (arXiv 2405.18392), linear 1 - d,
                              cosine (1 + cos(pi d)) / 2, exponential 2 * 0.5^d - 1, as in Megatron

    From step `total` on all but `constant` stay at `minimum`. Warmup starts at 0 even where
    `minimum` > 0, as Megatron's and transformers' schedules do.

    Raises ValueError for a negative step, a warmup outside [0, total], a minimum outside [0, peak],
    fewer than one cycle, an unknown style, a decay that does not fit between warmup and end.
    """
    _check(step, peak=peak, minimum=minimum, warmup=warmup, total=total, style=style, cycles=cycles)
    if style == "wsd":
        _check_wsd(wsd_decay_steps, wsd_decay_style, total - warmup)
    if step < warmup:
        return peak * step / warmup
    if style == "constant":
        return peak
    if step >= total:
        return minimum
    progress = (step - warmup) / (total - warmup)
    if style == "wsd":
        progress = max(0.0, (step - (total - wsd_decay_steps)) / wsd_decay_steps)
        style = wsd_decay_style
    if style == "linear":
        share = 1.0 - progress
    elif style == "cosine":
        share = 0.5 * (1.0 + math.cos(math.pi * progress))
    elif style == "minus_sqrt":
        share = 1.0 - math.sqrt(progress)
    elif style == "exponential":
        share = 2.0 * 0.5**progress - 1.0
    else:
        share = 0.5 * (1.0 + math.cos(math.pi * (cycles * progress % 1.0)))
    return minimum + (peak - minimum) * share


def _check(
    step: int, *, peak: float, minimum: float, warmup: int, total: int, style: str, cycles: int
) -> None:
    if step < 0:
        raise ValueError(f"step = {step}: steps are counted from 0")
    if not 0 <= warmup <= total:
        raise ValueError(
            f"optimizer.lr_warmup_steps = {warmup} must lie in [0, steps of the run = {total}]; "
            f"lower it (3 to 10 % of the run is usual: {max(1, total // 20)}) or train longer"
        )
    if not 0 <= minimum <= peak:
        raise ValueError(f"optimizer.min_lr = {minimum} must lie in [0, optimizer.lr = {peak}]; lower it")
    if style not in STYLES:
        raise ValueError(f"optimizer.lr_decay_style = {style!r} is none of {', '.join(STYLES)}")
    if cycles < 1:
        raise ValueError(f"optimizer.lr_num_cycles = {cycles} must be at least 1")


def _check_wsd(decay_steps: int, decay_style: str, room: int) -> None:
    if not 1 <= decay_steps <= room:
        raise ValueError(
            f"optimizer.lr_wsd_decay_steps = {decay_steps} must lie in [1, steps after warmup = {room}]; "
            f"10 to 20 % of the run is usual: {max(1, room // 10)}"
        )
    if decay_style not in WSD_STYLES:
        raise ValueError(f"optimizer.lr_wsd_decay_style = {decay_style!r} is none of {', '.join(WSD_STYLES)}")

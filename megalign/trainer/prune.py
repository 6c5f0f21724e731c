"""Which checkpoints stay: the last few and the best few."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def checkpoints_to_remove(
    checkpoints: Sequence[Path], evaluations: Sequence[tuple[int, float]], keep_last: int, keep_best: int
) -> list[Path]:
    """Those of `checkpoints` (oldest first) that are neither among the last nor among the best.

    evaluations: (step, eval_loss); a checkpoint without an evaluation at its step can only stay as one of the last.
    """
    last = set(checkpoints[-keep_last:]) if keep_last else set()
    scored = dict(evaluations)
    ranked = sorted((path for path in checkpoints if _step(path) in scored), key=lambda path: (scored[_step(path)], _step(path)))
    return [path for path in checkpoints if path not in last and path not in set(ranked[:keep_best])]


def best_checkpoint(checkpoints: Sequence[Path], evaluations: Sequence[tuple[int, float]]) -> Path | None:
    """The one with the lowest eval_loss among those that still exist."""
    scored = dict(evaluations)
    found = [path for path in checkpoints if _step(path) in scored]
    return min(found, key=lambda path: scored[_step(path)]) if found else None


def _step(path: Path) -> int:
    return int(path.name.split("_")[1])

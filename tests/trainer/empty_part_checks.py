"""Checkpoints where a rank holds no parameter of one of megatron's optimizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

DENSE_FIRST = {"moe_layer_freq": [0, 1], "share_embeddings_and_output_weights": False}


def run(cases: dict[str, tuple[dict[str, Any], dict[str, Any]]], folder: Path) -> dict[str, Any]:
    """Of each case (parallel, train): weights after four steps, whole and resumed after two; ranks without expert parameters."""
    return {name: one(parallel, folder / name, train) for name, (parallel, train) in cases.items()}


def one(parallel: dict[str, Any], folder: Path, train: dict[str, Any]) -> dict[str, Any]:
    from shadow_checks import engine_of, step, weights

    from megalign.parallel.grid import destroy_grid
    from megalign.parallel.optimizer import parts_of

    def engine() -> Any:
        return engine_of(parallel, model=DENSE_FIRST, **train)

    whole, losses = engine(), []
    for number in range(1, 5):
        losses.append(step(whole, number))
        if number == 2:
            saved = whole.save(folder, 2, {"step": 2}).finish()
    empty = [not any(group["params"] for group in part.optimizer.param_groups) for part in parts_of(whole.optimizer)]
    found: dict[str, Any] = {"weights": weights(whole), "losses": losses, "empty": empty, "path": saved}
    destroy_grid()
    resumed = engine()
    resumed.load(saved)
    again = [step(resumed, number) for number in (3, 4)]
    twice = resumed.save(folder, 4, {"step": 4}).finish()  # what has been loaded can be saved
    found |= {"resumed": weights(resumed), "again": again, "twice": twice}
    destroy_grid()
    return found


def elsewhere(checkpoint: Path, distributed: bool, train: dict[str, Any]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Steps 3 and 4 on one rank."""
    from shadow_checks import engine_of, step, weights

    engine = engine_of({"use_distributed_optimizer": distributed}, model=DENSE_FIRST, **train)
    engine.load(checkpoint)
    return [step(engine, number) for number in (3, 4)], weights(engine)

"""One step of AdamW without any gradient: what is left is the decay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def decayed(cases: list[dict[str, Any]], folder: Path) -> list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], float]]:
    """(full weights before, after, 1 - lr * weight_decay) of each case, rank 0's; the step is taken by a run that was resumed."""
    from shadow_checks import engine_of, step, weights

    from megalign.parallel.grid import destroy_grid
    from megalign.parallel.optimizer import finish_parameters, set_learning_rate, zero_gradients

    found = []
    for number, case in enumerate(cases):
        engine = engine_of(**case)
        step(engine, 1)
        saved = engine.save(folder / str(number), 1, {"step": 1}).finish()
        destroy_grid()
        engine = engine_of(**case)
        engine.load(saved)
        for part in getattr(engine.optimizer, "chained_optimizers", [engine.optimizer]):
            for state in part.optimizer.state.values():
                for name in ("exp_avg", "exp_avg_sq"):
                    if name in state:
                        state[name].zero_()
        zero_gradients(engine.chunks, engine.optimizer)
        set_learning_rate(engine.optimizer, 5.0)
        before = weights(engine)
        engine.optimizer.step()
        finish_parameters(engine.chunks)
        found.append((before, weights(engine), 1 - 5.0 * engine.recipe.optimizer.weight_decay))
        destroy_grid()
    return found

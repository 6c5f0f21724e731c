"""Training runs in which one rank's copy of a weight is changed between two steps; for test_audit_in_runs.py."""

from __future__ import annotations

from typing import Any

import sft_checks

STEP, PARAMETER, BY = 3, "decoder.final_layernorm.weight", 0.0625


def with_a_changed_weight(recipes: list[dict[str, Any]]) -> list[tuple[str, float]]:
    """(error or "", the weight that was changed, as this rank has it at the end) of each run."""
    import torch.distributed as dist

    from megalign.trainer.engine import Engine

    train_step, last = Engine.train_step, []

    def tampered(self: Any, microbatches: Any, objective: Any, lr: float, step: int) -> Any:
        weight = self.models[0].decoder.final_layernorm.weight
        if step == STEP and dist.get_rank() == 1:
            weight.data[0] += BY
        last[:] = [weight]
        return train_step(self, microbatches, objective, lr, step)

    Engine.train_step = tampered
    try:
        return [(sft_checks.train(recipe), float(last[0].data[0])) for recipe in recipes]
    finally:
        Engine.train_step = train_step

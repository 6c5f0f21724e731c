"""Runs with the optimizer on the device and on the host, whose every number can be compared where both are the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def run(parallel: dict[str, Any], folder: Path, train: dict[str, Any], offloaded: bool) -> dict[str, Any]:
    """Four steps, and after two a checkpoint from which another engine does the last two. Weights whole, on rank 0."""
    from shadow_checks import averages, engine_of, step, weights

    from megalign.parallel.grid import destroy_grid
    from megalign.parallel.optimizer import parts_of

    engine = engine_of(parallel, optimizer_cpu_offload=offloaded, **train)
    losses = []
    for number in range(1, 5):
        losses.append(step(engine, number))
        if number == 2:
            saved = engine.save(folder, 2, {"step": 2}).finish()
    found: dict[str, Any] = {"losses": losses, "weights": weights(engine), "average": averages(engine), "path": saved}
    inner = [part.optimizer for part in parts_of(engine.optimizer)]
    found["kinds"] = {type(optimizer).__name__ for optimizer in inner}
    found["owned"] = sum(parameter.numel() for optimizer in inner for group in optimizer.param_groups for parameter in group["params"])
    if offloaded:
        found["bytes"] = [sum(optimizer.bytes()[side] for optimizer in inner) for side in ("device", "host")]
        found["moments"] = {value.device.type for optimizer in inner for state in optimizer.inner.state.values() for value in state.values()}
        found["leftover"] = any(host.grad is not None for optimizer in inner for host in optimizer.hosts.values())
    destroy_grid()
    found["resumed"] = go_on(parallel, saved, train, offloaded)
    return found


def go_on(parallel: dict[str, Any], checkpoint: Path, train: dict[str, Any], offloaded: bool) -> dict[str, torch.Tensor]:
    """The last two steps from a checkpoint."""
    from shadow_checks import engine_of, step, weights

    from megalign.parallel.grid import destroy_grid

    engine = engine_of(parallel, optimizer_cpu_offload=offloaded, **train)
    engine.load(checkpoint)
    for number in (3, 4):
        step(engine, number)
    found = weights(engine)
    engine.load(checkpoint, weights_only=True)  # reloads masters from weights
    destroy_grid()
    return found

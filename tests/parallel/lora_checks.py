"""LoRA on any layout: loss, gradients and norm of adapters whose B is not zero, for comparison with one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from layout_checks import VOCAB, microbatches

from megalign.config.schema import Recipe


def engine_of(case: dict[str, Any], *, random_b: bool = True) -> Any:
    """The engine of a recipe on this world, every B drawn by name (at 0 no gradient would reach an A)."""
    import os

    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

    from megalign.parallel.init import read_world
    from megalign.trainer.engine import Engine
    from megalign.trainer.run import grid_of

    get_moe_layer_wise_logging_tracker().clear()
    recipe = Recipe.model_validate(case)
    engine = Engine(recipe, grid_of(recipe, read_world(os.environ)), VOCAB)
    if random_b:
        fill_b(engine)
    return engine


@torch.no_grad()
def fill_b(engine: Any) -> None:
    from megalign.models.hf.shards import local_from_full
    from megalign.models.weights import full_shape, generator_of, named_parameters

    for name, parameter, place in named_parameters(engine.models, engine.grid):
        if ".lora_B_" in name:
            full = torch.empty(full_shape(name, parameter.shape, place)).normal_(0, 0.1, generator=generator_of(5, name))
            parameter.copy_(local_from_full(name, full, place))
    engine.optimizer.reload_model_params()


def batches(engine: Any) -> list[Any]:
    everything = microbatches(4, document_multiple=4)
    share = len(everything) // engine.grid.data.size
    return everything[engine.grid.data.rank * share : (engine.grid.data.rank + 1) * share]


def objective() -> Any:
    from megalign.sft import token_loss
    from megalign.trainer.objective import Objective

    return Objective(token_loss)


def main_grad(parameter: Any) -> torch.Tensor:
    return parameter.main_grad


def full_weights(engine: Any) -> dict[str, torch.Tensor]:
    from megalign.models.weights import stream_full

    return {name: full.clone() for name, full in stream_full(engine.models, engine.grid)}


def step(case: dict[str, Any]) -> dict[str, Any]:
    """Loss, full gradients and norm; whether the base stayed; the loss without adapters, and with merged ones."""
    from megalign.models.weights import stream_full
    from megalign.parallel.grid import destroy_grid
    from megalign.parallel.lora import adapters_off, is_adapter, merge
    from megalign.parallel.optimizer import zero_gradients

    engine = engine_of(case, random_b=False)
    mine = batches(engine)
    fresh = engine.evaluate([mine], objective()).loss
    fill_b(engine)
    before = full_weights(engine)
    zero_gradients(engine.chunks, engine.optimizer)
    sums, _ = engine._run(mine, objective(), forward_only=False)
    trained = {name: full.clone() for name, full in stream_full(engine.chunks, engine.grid, value=main_grad, only=is_adapter)}
    frozen = [name for name, parameter in engine.models[0].named_parameters() if not parameter.requires_grad]
    _, norm, _ = engine.optimizer.step()
    after = full_weights(engine)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    adapted = engine.evaluate([mine], objective()).loss
    with adapters_off(engine.models):
        base = engine.evaluate([mine], objective()).loss
    placements = {p.name: (p.shard, p.gradients, p.reducers) for p in engine.placements if is_adapter(p.name)}
    held = sum(parameter.numel() for parameter in engine.models[0].parameters() if parameter.requires_grad)
    merge(engine.models)
    merged = engine.evaluate([mine], objective()).loss
    destroy_grid()
    return {
        "loss": sums.means().loss, "norm": float(norm), "grads": trained, "moved": moved, "frozen": len(frozen), "held": held, "fresh": fresh,
        "base": base, "adapted": adapted, "merged": merged, "placements": placements, "names": list(before),
    }  # fmt: skip


def steps(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`step` of several recipes, one after the other in one launch."""
    return [step(case) for case in cases]


def audited(case: dict[str, Any], fault: str | None) -> list[str]:
    """Two steps under the auditor, with a defect: "hooks" none is attached, "declaration" every partial A or B said to be full."""
    from megalign.parallel.grid import destroy_grid
    from megalign.trainer import engine as module

    kept = module.attach, module.place
    if fault == "hooks":
        module.attach = lambda chunks, placements, grid, **options: kept[0](chunks, [], grid, **options)
    elif fault == "declaration":
        module.place = lambda chunks, named, grid, **options: kept[1](chunks, [_said_full(entry) for entry in named], grid, **options)
    try:
        engine = engine_of({**case, "audit": {"interval": 1}})
        engine.audit.start(0, _Silent())
        for number in (1, 2):
            engine.train_step(batches(engine), objective(), 1e-3, number)
        return list(engine.audit.history)
    finally:
        module.attach, module.place = kept
        destroy_grid()


def _said_full(entry: tuple[str, Any]) -> tuple[str, Any]:
    from megalign.parallel.placement import declare

    name, parameter = entry
    declaration = getattr(parameter, "placement", None)
    if ".lora_" in name and declaration is not None and declaration.gradients:
        said: dict[str, Any] = dict.fromkeys(declaration.gradients, "full")
        declare(parameter, shard=declaration.shard, **said)
    return entry


class _Silent:
    def event(self, *args: Any) -> None:
        pass


def audits(case: dict[str, Any], experts: dict[str, Any]) -> dict[str, list[str]]:
    """Of a model under TP with SP, and of experts under ETP."""
    found = {fault or "none": audited(case, fault) for fault in (None, "hooks", "declaration")}
    return found | {f"experts {fault or 'none'}": audited(experts, fault) for fault in (None, "hooks")}


def probed(case: dict[str, Any]) -> list[str]:
    """Findings of the probe: gradients against differences of the loss, in FP64."""
    from megalign.parallel.grid import destroy_grid
    from megalign.trainer.probing import probe_engine

    engine = engine_of(case)
    found = [finding.text() for finding in probe_engine(engine, VOCAB)]
    destroy_grid()
    return found


def save_and_load(case: dict[str, Any], folder: str, load: str | None) -> dict[str, Any]:
    """Two steps and a checkpoint (load: None), or one that another layout saved; the adapters, the loss of the step after, what is stored."""
    from megatron.core.dist_checkpointing import load_tensors_metadata

    from megalign.parallel.grid import destroy_grid

    engine = engine_of(case, random_b=load is None)
    if load is None:
        for number in (1, 2):
            engine.train_step(batches(engine), objective(), 1e-3, number)
        load = str(engine.save(Path(folder), 2, {"step": 2}).finish())
    else:
        engine.load(Path(load))
    weights = {name: full for name, full in full_weights(engine).items() if ".lora_" in name}
    result = engine.train_step(batches(engine), objective(), 1e-3, 3)
    destroy_grid()
    stored = {key: tuple(entry.global_shape) for key, entry in load_tensors_metadata(str(Path(load) / "state")).items()}
    return {"path": load, "weights": weights, "loss": result.loss, "norm": result.grad_norm, "stored": stored}

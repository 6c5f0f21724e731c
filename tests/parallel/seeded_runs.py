"""Engines with a seeded fault, what the auditor says of them, and whether that is right; run on ranks."""

from __future__ import annotations

import importlib
import re
from typing import Any

from seeded_faults import FAULTS
from seeded_layouts import LATE, REFUSED, VOCAB, Fault, recipe_of


def engine_of(layout: str, fault: Fault | None) -> Any:
    """The engine of a recipe with the fault in it, on a new grid (collective)."""
    from megalign.parallel.grid import create_grid
    from megalign.trainer import engine, probing

    recipe = recipe_of(layout, fault is not None and fault.probe)
    keys = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size")
    grid = create_grid(**{key: getattr(recipe.parallel, key) for key in keys})
    if fault is not None and fault.when == "code":
        fault.inject()
    if fault is not None and fault.when in ("built", "placed"):
        for module in (engine, probing):
            _around_place(module, fault)
    made = engine.Engine(recipe, grid, VOCAB)
    if fault is not None and fault.when == "made":
        fault.inject(made)
    return made


def _around_place(module: Any, fault: Fault) -> None:
    place = module.place

    def tampered(models: Any, *args: Any, **kwargs: Any) -> Any:
        first = not getattr(models[0], "tampered", False)  # the probe's copy was tampered with when it was copied
        if fault.when == "built" and first:
            fault.inject(list(models), args[1])
            models[0].tampered = True
        found = place(models, *args, **kwargs)
        if fault.when == "placed":
            fault.inject(list(models), args[1])
        return found

    module.place = tampered


def batches_of(engine: Any, rows: int) -> list[Any]:
    from megalign.trainer.probing import random_batches

    return random_batches(engine.grid, VOCAB, rows)


def _changed_by_faults() -> list[tuple[Any, str]]:
    finalize_model_grads = importlib.import_module("megatron.core.distributed.finalize_model_grads")  # the package has a function of that name
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucket

    from megalign.parallel.reduction import Bucket
    from megalign.trainer import engine, objective, probing

    places = [(module, "place") for module in (engine, probing)]
    names = ("_allreduce_word_embedding_grads", "_allreduce_non_tensor_model_parallel_grads", "get_updated_expert_bias")
    places += [(finalize_model_grads, name) for name in names]
    return [(Bucket, "finish"), (Bucket, "send"), (_ParamAndGradBucket, "__init__"), (objective, "rescale_for_megatron"), *places]


def audits(cases: list[tuple[str, str | None, int]]) -> list[list[tuple[str, str, bool]]]:
    """`audit` of (layout, name of a fault or None, steps), one after the other in one launch."""
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

    from megalign.parallel.grid import destroy_grid
    from megalign.parallel.placement import PlacementError

    found = []
    for layout, name, steps in cases:
        kept = [(owner, attribute, getattr(owner, attribute)) for owner, attribute in _changed_by_faults()]
        get_moe_layer_wise_logging_tracker().clear()
        try:
            found.append(audit(layout, None if name is None else FAULTS[name], steps))
        except PlacementError as error:
            found.append([(str(error).partition(":")[0], REFUSED, False)])
        except Exception as error:  # all ranks fail alike, or the launch times out
            found.append([("", f"{type(error).__name__}: {error}", False)])
        destroy_grid()
        for owner, attribute, value in kept:
            setattr(owner, attribute, value)
    return found


def audit(layout: str, fault: Fault | None, steps: int = 1) -> list[tuple[str, str, bool]]:
    """What the auditor says of a run: (parameter, cause, follows), in its order."""
    from megalign.losses import cross_entropy_loss
    from megalign.trainer.metrics import NullLogger
    from megalign.trainer.objective import Objective
    from megalign.trainer.probing import probe_engine

    engine = engine_of(layout, fault)
    batches = batches_of(engine, 2)
    objective = Objective(lambda output, batch: cross_entropy_loss(*output))

    def step(number: int) -> list[Any]:
        engine.train_step(batches, objective, 1e-3, number)
        return list(engine.audit.auditor.last) if engine.audit.auditor.due(number) else []

    found: list[Any] = []
    if fault is not None and fault.probe:
        found += probe_engine(engine, VOCAB)
    running = fault is not None and fault.when == "running"
    first = LATE if running else 1
    engine.audit.start(first - 1, NullLogger())
    found += engine.audit.auditor.last
    found += step(first)
    if fault is not None and running:
        assert not found, found
        fault.inject(engine)
        step(LATE + 1)
        found += step(LATE + 2)
    for number in range(first + 1, steps + 1):
        found += step(number)
    return [(finding.parameter, finding.cause, finding.follows) for finding in found]


def judged(name: str, found: list[tuple[str, str, bool]]) -> tuple[str, str]:
    """(verdict, name of the cause that was found): "caught", or what is amiss. Findings that follow from another do not count;
    of the others the first must have the cause, and all the parameter (or be the global norm, which follows from any)."""
    from megalign.parallel.audit import findings

    names = {value: key for key, value in vars(findings).items() if isinstance(value, str) and key.isupper()} | {REFUSED: "REFUSED"}
    fault = FAULTS[name]
    roots = [(parameter, cause) for parameter, cause, follows in found if not follows]
    if not roots:
        return "missed", "-"
    cause = names.get(roots[0][1], roots[0][1])
    strangers = [parameter for parameter, _ in roots if not re.search(fault.finding, parameter.replace(".*.", ".0.")) and parameter != "gradient norm"]
    if strangers:
        return f"another parameter: {strangers[0]}", cause
    return ("caught" if cause in fault.cause.split("|") else "another cause"), cause


def clean_cells(cells: list[Any], bf16: bool, steps: int, interval: int) -> list[list[tuple[str, str]]]:
    """What the auditor says of cells of the layout matrix without a fault: (parameter, cause)."""
    from cell_checks import SMOOTH, _forget
    from layout_checks import Run

    from megalign.models.held import held_by
    from megalign.parallel.audit.auditor import Auditor

    said = []
    for cell in cells:
        run = Run(
            cell.model_config(),
            cell.layout(),
            distributed=cell.distributed,
            overlap="gradients" in cell.overlap,
            overlap_param_gather="parameters" in cell.overlap,
            bucket_size=None if cell.overlap == "none" else 5000,
            rows=cell.microbatches,
            document_multiple=cell.document_multiple,
            bf16=bf16,
            **SMOOTH,
        )
        auditor = Auditor(run.grid, lambda run=run: held_by(run.models, run.grid), run.chunks, run.optimizer, run.placements, interval=interval)
        found = auditor.start()
        for step in range(1, steps + 1):
            run.backward()
            if auditor.due(step):
                found = found + auditor.before_update(step)
            run.optimizer.step()
        said.append([(finding.parameter, finding.cause) for finding in found])
        _forget()
    return said

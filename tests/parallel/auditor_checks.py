"""Whether the auditor still finds a fault, names it, and does what follows; run on two ranks, with a mutation in it or not (reduction_mutants.py)."""

from __future__ import annotations

from typing import Any

import probe_checks
import torch
import torch.distributed as dist
from audit_checks import BIASED, EXPERT, NORM, QKV, ROUTER, audited, one
from layout_checks import Run
from replica_checks import MOE as DEEP

MOE = {**DEEP, "num_layers": 2}

TP2 = dict(tensor_model_parallel_size=2, sequence_parallel=True)
EP2 = dict(expert_model_parallel_size=2)
DATA: dict[str, Any] = {}
PLAIN = {"distributed": False}
BIAS = "decoder.layers.0.mlp.router.expert_bias"
# fault: (layout, options of `audited`, parameter, cause, ranks, step, difference or None, part of the line that mends it)
FAULTS: dict[str, tuple[dict[str, Any], dict[str, Any], str, str, tuple[int, ...], int, float | None, str]] = {
    "initialisation": (TP2, {}, ROUTER, "INITIALISATION", (1,), 0, 1e-3, "initialise"),
    "last element": (TP2, {}, ROUTER, "INITIALISATION", (1,), 0, 1e-3, "initialise"),
    "exchanged": (TP2, {}, ROUTER, "INITIALISATION", (1,), 0, None, "initialise"),
    "cut weight": (DATA, PLAIN, f"{QKV}|tp0", "INITIALISATION", (1,), 0, 1e-3, "initialise"),
    "hook gone": (TP2, {}, NORM, "MISSING_SUM", (1,), 1, None, 'declare(pre_mlp_layernorm.weight, tensor="partial")'),
    "allreduce=False": (EP2, {}, NORM, "MISSING_SUM", (1,), 1, None, "`allreduce = True`"),
    "counted on every tensor rank": (TP2, {}, NORM, "COUNTED_TWICE", (0, 1), 1, None, "tensor_model_parallel = False"),
    "an expert left out": (TP2, PLAIN, f"{EXPERT}|etp0", "NOT_COUNTED", (0,), 1, None, "tensor_model_parallel = True"),
    "norm of one rank": (TP2, {}, "gradient norm", "NORM", (1,), 1, None, "clipping"),
    "moments": (TP2, {}, NORM, "MOMENTS", (1,), 2, 1e-3, "optimizer state"),
    "second moments": (TP2, {}, NORM, "MOMENTS", (1,), 2, 1e-3, "optimizer state"),
    "masters": (DATA, {**PLAIN, "bf16": True}, NORM, "MASTERS", (1,), 2, 1e-3, "optimizer state"),
    "expert's moments": (DATA, PLAIN, f"{EXPERT}|etp0", "MOMENTS", (1,), 2, 1e-3, "optimizer state"),
    "frozen": (TP2, {}, NORM, "FROZEN", (1,), 2, None, "train.freeze"),
    "late": (DATA, {}, "late", "LATE", (1,), 2, None, "before wrap_data_parallel"),
    "absent": (DATA, {"fault": "late"}, "late", "ABSENT", (0,), 2, None, "register it on every rank"),
    "another dtype": (DATA, {}, "scales", "UNLIKE", (1,), 0, None, "same size and dtype"),
    "bias": (TP2, {"model": {**BIASED, "num_layers": 2}}, BIAS, "BUFFER", (1,), 2, 0.01, "all-reduce"),
    "bf16 bias": (DATA, {"model": {**BIASED, "num_layers": 2}}, BIAS, "LOW_PRECISION", (0, 1), 0, None, "expert_bias.data.float()"),
}


def audit(case: str) -> list[str]:
    """What is wrong with what the auditor says of a fault."""
    from megalign.parallel.audit import findings

    if case == "repaired":
        return repaired()
    if case == "nothing":
        return [f"{found[0]}: {found[1]}" for found in audited(None, TP2, {"model": MOE, "steps": 2})["found"]]
    layout, options, parameter, cause, ranks, step, difference, fix = FAULTS[case]
    found = audited(options.get("fault", case), layout, {"model": MOE, "steps": 2, **options})["found"]
    meant = [entry for entry in found if entry[:2] == (parameter, getattr(findings, cause))]
    if not meant:
        return [f"{parameter}: {cause} is not among {[entry[:2] for entry in found[:3]]}"]
    _, _, _, off, first, size, _, line = meant[0]
    if difference is not None and not abs(size / difference - 1) < 0.05:
        return [f"difference {size} in the place of {difference}"]
    if off != ranks or first != step or fix not in line:
        return [f"ranks {off}, step {first}, fix {line!r} in the place of {ranks}, {step}, {fix!r}"]
    return []


def repaired() -> list[str]:
    """The copy that was changed gets the first rank's value, once and for all."""
    from megalign.models.held import held_by
    from megalign.parallel.audit.auditor import Auditor

    run = Run(MOE, DATA, distributed=False)
    auditor = Auditor(run.grid, lambda: held_by(run.models, run.grid), run.chunks, run.optimizer, run.placements, interval=1, repair=True)
    wrong = [str(found) for found in auditor.start()]
    weight, found = one(run, NORM), []
    for step in range(1, 4):
        if step == 2 and run.grid.rank == 1:
            weight.data[3] += 1e-3
        run.backward()
        before = weight.data[3].clone()
        found.append(len(auditor.before_update(step)))
        dist.broadcast(before, src=0)
        if weight.data[3] != before:
            wrong.append(f"step {step}: rank {run.grid.rank} has {weight.data[3]:.6f}, the first had {before:.6f}")
        run.optimizer.step()
    return wrong + ([f"{found} findings in three steps"] if found != [0, 1, 0] else [])


def run(on_failure: str) -> list[str]:
    """An engine whose weight is changed on one rank between two steps: what it is told, and what it does."""
    from seeded_injections import named
    from seeded_layouts import VOCAB, recipe_of
    from seeded_runs import batches_of

    from megalign.losses import cross_entropy_loss
    from megalign.parallel.grid import create_grid
    from megalign.trainer.engine import Engine
    from megalign.trainer.guard import TrainingStopped
    from megalign.trainer.metrics import NullLogger
    from megalign.trainer.objective import Objective

    recipe = recipe_of("data", False)
    recipe.audit.interval, recipe.audit.on_failure = 2, on_failure
    recipe.train.precision = "fp32"  # with BF16, the next update writes the weight anew from its master
    engine = Engine(recipe, create_grid(), VOCAB)
    engine.audit.start(0, NullLogger())
    batches, told = batches_of(engine, 2), []
    for step in range(1, 7):
        if step == 4 and dist.get_rank() == 1:
            named(engine, "layers.0.input_layernorm")[0].data.view(-1)[0] += 0.0625
        kept = [p.detach().clone() for p in engine.models[0].parameters()]
        try:
            engine.train_step(batches, Objective(lambda output, batch: cross_entropy_loss(*output)), 1e-3, step)
        except TrainingStopped as stop:
            still = all(torch.equal(p, was) for p, was in zip(engine.models[0].parameters(), kept, strict=True))
            good = on_failure == "stop" and stop.step == 4 and still and "input_layernorm" in str(stop.parameter)
            return [] if good else [f"stopped at step {stop.step}: {stop}"]
        told.append(len(engine.audit.take_messages()))
    if on_failure == "stop":
        return ["it did not stop"]
    return [] if told == [0, 0, 0, 1, 0, 0] else [f"messages at six steps: {told}"]


def probe(case: str) -> list[str]:
    """What is wrong with what the probe says of a fault on which all copies agree."""
    from test_audit_probe import FAULTS as PROBED

    if case == "nothing":
        found = probe_checks.probed(None, probe_checks.SMALL, TP2, {}) + probe_checks.probed(None, probe_checks.LEARNED, dict(pipeline_model_parallel_size=2), {})
        return [f"{entry[0]}: {entry[1]}" for entry in found]
    model, layout, kind, cause, group, everything = PROBED[case]
    found = probe_checks.probed(case, model, layout, {})
    if (kind, cause) not in [entry[:2] for entry in found]:
        return [f"{kind}: {cause!r} is not among {[entry[:2] for entry in found[:3]]}"]
    others = [entry[0] for entry in found if entry[0] != kind]
    return [f"named as well: {others[0]}"] if case == "small lost factor" and others else []

"""Faults of our own, put into a running model, and what the auditor says of each; for test_audit.py."""

from __future__ import annotations

from typing import Any

import torch
from layout_checks import Run
from replica_checks import MOE, _disarm
from replica_extras import DECLARED, add_extras

BIASED = {**MOE, "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True, "moe_aux_loss_coeff": 0.0}
NORM = "decoder.layers.1.pre_mlp_layernorm.weight"
ROUTER = "decoder.layers.1.mlp.router.weight"
QKV = "decoder.layers.0.self_attention.linear_qkv.weight"
EXPERT = "decoder.layers.0.mlp.experts.local_experts.3.linear_fc1.weight"
STATES = {"moments": (NORM, "exp_avg"), "second moments": (NORM, "exp_avg_sq"), "masters": (NORM, "master"), "expert's moments": (EXPERT, "exp_avg")}


def one(run: Run, name: str) -> Any:
    """This rank's parameter of that global name, or None."""
    return next((p.parameter for p in run.placements if p.name == name), None)


def audited(fault: str | None, layout: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Three steps with a fault, looked at before each: findings as tuples, and the summary."""
    from megalign.models.held import held_by
    from megalign.parallel.audit.auditor import Auditor
    from megalign.parallel.grid import destroy_grid

    def tamper(run: Run) -> None:
        if fault == "initialisation" and run.grid.rank == 1:
            one(run, ROUTER).data[0, 0] += 1e-3
        if fault == "flag removed":
            one(run, NORM).sequence_parallel = False
        if fault == "counted on every tensor rank":
            one(run, NORM).tensor_model_parallel = True
        if fault == "an expert left out":
            for p in run.placements:
                if p.name.endswith("local_experts.3.linear_fc1.weight"):
                    p.parameter.shared = True  # pyright: ignore[reportAttributeAccessIssue]
        if fault == "bf16 bias":  # as Float16Module leaves it, until the router's first forward
            for module in run.models[0].modules():
                if getattr(module, "expert_bias", None) is not None:
                    module.expert_bias = module.expert_bias.bfloat16()
        if fault == "allreduce=False":
            one(run, NORM).allreduce = False
        if fault == "last element" and run.grid.rank == 1:
            one(run, ROUTER).data[-1, -1] += 1e-3
        if fault == "exchanged" and run.grid.rank == 1:
            one(run, ROUTER).data[0, :2] = one(run, ROUTER).data[0, :2].flip(0)
        if fault == "cut weight" and run.grid.rank == 1:
            one(run, QKV).data[0, 0] += 1e-3
        if fault == "another dtype":
            run.models[0].register_buffer("scales", torch.zeros(4, dtype=torch.bfloat16 if run.grid.rank else torch.float32))

    def prepare(models: Any, grid: Any) -> None:
        add_extras(models, grid, options.get("kinds", ()), options.get("declared"))

    run = Run(
        options.get("model", MOE),
        layout,
        distributed=options.get("distributed", True),
        hooks=options.get("hooks", True),
        bf16=options.get("bf16", False),
        overlap=options.get("overlap", False),
        prepare=prepare,
        tamper=tamper,
    )
    if fault == "hook gone":
        _disarm(run, one(run, NORM))
    if fault == "norm of one rank" and run.grid.rank == 1:
        honest = run.optimizer.get_grad_norm
        run.optimizer.get_grad_norm = lambda: 2 * honest()
    auditor = Auditor(
        run.grid, lambda: held_by(run.models, run.grid), run.chunks, run.optimizer, run.placements, interval=1, repair=options.get("repair", False)
    )
    found = auditor.start()
    for step in range(1, options.get("steps", 3) + 1):
        if step == 2 and run.grid.rank == 1:
            _break(run, fault)
        run.backward()
        found = found + auditor.before_update(step)
        run.optimizer.step()
    after = auditor.summary()
    destroy_grid()
    return {"found": [(f.parameter, f.cause, f.group, f.ranks, f.first_step, f.difference, f.follows, f.fix) for f in found], "summary": after}


def _break(run: Run, fault: str | None) -> None:
    """Faults of the second step, on rank 1."""
    if fault == "weight":
        one(run, NORM).data[3] += 1e-3
    elif fault in STATES:
        from megalign.parallel.audit.held import states

        name, kind = STATES[fault]
        (held,) = [h for h in _held(run) if h.name == name]
        for entry in states([held], run.optimizer):
            if entry.kind == kind:
                entry.value.view(-1)[:1] += 1e-3
    elif fault == "frozen":
        one(run, NORM).requires_grad_(False)
    elif fault == "late":
        run.models[0].register_parameter("late", torch.nn.Parameter(torch.ones(3)))
    elif fault == "bias":
        router: Any = next(m for m in run.models[0].modules() if getattr(m, "expert_bias", None) is not None)
        router.expert_bias[0] += 0.01


def _held(run: Run) -> Any:
    from megalign.models.held import held_by

    return held_by(run.models, run.grid)


def sweep(cases: list[tuple[str | None, dict[str, Any], dict[str, Any]]]) -> list[dict[str, Any]]:
    """`audited` of several cases in one launch."""
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

    found = []
    for case in cases:
        get_moe_layer_wise_logging_tracker().clear()
        found.append(audited(*case))
    return found


ALL_KINDS = {"kinds": tuple(DECLARED)}

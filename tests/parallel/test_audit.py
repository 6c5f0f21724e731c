"""The auditor: silent over clean layouts, and naming parameter, ranks and cause of each fault (P3, P5, P9)."""

from __future__ import annotations

from functools import cache
from typing import Any

import audit_checks
import pytest
from audit_checks import ALL_KINDS, BIASED, NORM, ROUTER
from ranks import run_ranks

from megalign.parallel.audit import findings as f

TP2 = dict(tensor_model_parallel_size=2, sequence_parallel=True)
PP2 = dict(pipeline_model_parallel_size=2)
TIED = {**BIASED, "share_embeddings_and_output_weights": True}

CLEAN: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "tensor": (2, TP2, ALL_KINDS),
    "bf16": (2, TP2, {"bf16": True, "model": BIASED}),
    "data, unsharded optimizer": (2, {}, {"distributed": False, **ALL_KINDS}),
    "experts, bf16, unsharded": (2, dict(expert_model_parallel_size=2), {"distributed": False, "bf16": True}),
    "virtual stages": (2, {**PP2, "virtual_pipeline_model_parallel_size": 2}, ALL_KINDS),
    "tied over stages, data": (4, PP2, {"model": TIED, "overlap": True}),
    "tensor, stages, experts": (4, {**TP2, **PP2, "expert_model_parallel_size": 2}, ALL_KINDS),
    "expert tensor": (4, {**TP2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2}, ALL_KINDS),
    "tensor, data": (4, TP2, {"model": BIASED, "hooks": False}),
}
# fault: (layout, options, the parameter, the cause, the ranks that are off, the step)
BIAS = "decoder.layers.0.mlp.router.expert_bias"
FAULTS: dict[str, tuple[dict[str, Any], dict[str, Any], str, str, tuple[int, ...] | None, int]] = {
    "initialisation": (TP2, {}, ROUTER, f.INITIALISATION, (1,), 0),
    "hook gone": (TP2, {}, NORM, f.MISSING_SUM, (1,), 1),
    "flag removed": (TP2, {"hooks": False}, NORM, f.MISSING_SUM, (1,), 1),
    "counted on every tensor rank": (TP2, {}, NORM, f.COUNTED_TWICE, (0, 1), 1),
    "an expert left out": (TP2, {}, "decoder.layers.0.mlp.experts.local_experts.3.linear_fc1.weight|etp0", f.NOT_COUNTED, None, 1),  # the rank whose optimizer has it
    "allreduce=False": (dict(expert_model_parallel_size=2), {}, NORM, f.MISSING_SUM, (1,), 1),
    "weight": ({}, {"distributed": False}, NORM, f.CHANGED, (1,), 2),
    "moments": (TP2, {}, NORM, f.MOMENTS, (1,), 2),
    "frozen": (TP2, {}, NORM, f.FROZEN, (1,), 2),
    "late": ({}, {}, "late", f.LATE, (1,), 2),
    "bf16 bias": ({}, {"model": BIASED}, BIAS, f.LOW_PRECISION, (0, 1), 0),
    "bias": (TP2, {"model": BIASED}, BIAS, f.BUFFER, (1,), 2),
}


@cache
def clean(world: int) -> dict[str, Any]:
    cells = {name: cell for name, cell in CLEAN.items() if cell[0] == world}
    return dict(zip(cells, run_ranks(audit_checks.sweep, world, [(None, layout, options) for _, layout, options in cells.values()])[0], strict=True))


@cache
def faulty() -> dict[str, Any]:
    cases: list[Any] = [(name, case[0], case[1]) for name, case in FAULTS.items()]
    return dict(zip(FAULTS, run_ranks(audit_checks.sweep, 2, cases)[0], strict=True))


@pytest.mark.parametrize("name", CLEAN)
def test_no_false_alarm(name: str):
    result = clean(CLEAN[name][0])[name]
    assert result["found"] == []
    assert result["summary"].endswith(", 0 drift")


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_named(name: str):
    _, _, parameter, cause, ranks, step = FAULTS[name]
    found = faulty()[name]["found"]
    assert any(p == parameter and c == cause for p, c, *_ in found), found[:5]
    first = next(entry for entry in found if entry[0] == parameter and entry[1] == cause)
    assert first[4] == step and (ranks is None or first[3] == ranks), first
    if cause in (f.CHANGED, f.INITIALISATION):
        assert first[5] == pytest.approx(1e-3, rel=1e-3)


def test_the_summary_counts():
    """2 ranks, TP 2: every copied parameter is held by the one pair."""
    summary = clean(2)["bf16"]["summary"]
    # embedding and output 2, final norm 1; a layer: 2 norms, qkv, proj, q and k norm, router, shared fc1 and fc2, 4 experts x 2
    assert summary == f"{3 + 4 * (2 + 2 + 2 + 1 + 2 + 8)} parameters, 1 groups, 0 drift"


def test_repair_makes_copies_equal_again():
    cases: list[Any] = [(name, TP2, {"repair": True, "steps": 4}) for name in ("initialisation", "moments")]
    for result in run_ranks(audit_checks.sweep, 2, cases)[0]:
        steps = {entry[4] for entry in result["found"]}
        assert len(steps) == 1, result["found"]  # found once, then never again
        assert result["summary"].endswith(", 0 drift")

"""The probe: gradients that all copies agree on are held against the loss itself."""

from __future__ import annotations

from functools import cache
from typing import Any

import probe_checks
import pytest
from probe_checks import LATENT, LEARNED, SMALL
from ranks import run_ranks

from megalign.parallel.audit import findings as f

TP2 = dict(tensor_model_parallel_size=2, sequence_parallel=True)
PP2 = dict(pipeline_model_parallel_size=2)
SOUND: dict[str, tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "tensor": (2, SMALL, TP2, {}),
    "experts, bf16": (2, SMALL, dict(expert_model_parallel_size=2, data_parallel_size=2), {"precision": "bf16"}),
    "learned, no sequence": (2, LEARNED, dict(tensor_model_parallel_size=2), {}),
    "stages": (2, LEARNED, PP2, {}),
    "context": (2, SMALL, dict(context_parallel_size=2), {}),
    "latent": (2, LATENT, TP2, {}),
    "all": (4, SMALL, {**TP2, **PP2, "expert_model_parallel_size": 2}, {}),
    "expert tensor": (4, SMALL, {**TP2, "data_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2}, {}),
}
ROUTER, TABLE = "decoder.layers.*.mlp.router.weight", "embedding.position_embeddings.weight"
# fault: (model, layout, a kind that must be named, cause, group, whether every kind is wrong)
FAULTS: dict[str, tuple[dict[str, Any], dict[str, Any], str, str, str, bool]] = {
    "mean for sum": (SMALL, TP2, ROUTER, f.TOO_SMALL, "tensor", False),
    "sum for full": (LEARNED, TP2, TABLE, f.TOO_LARGE, "tensor", False),
    "lost factor": (SMALL, dict(data_parallel_size=2), ROUTER, f.TOO_SMALL, "data_context", True),
    "small lost factor": (SMALL, dict(data_parallel_size=2), "decoder.final_layernorm.gain", f.TOO_SMALL, "data_context", False),
    "reduced twice": (SMALL, TP2, ROUTER, f.TOO_LARGE, "tensor", False),
    "one rank's part": (SMALL, TP2, ROUTER, f.WRONG, "", False),
}


@cache
def results(world: int) -> dict[str, Any]:
    cases: dict[str, Any] = {name: (None, *cell[1:]) for name, cell in SOUND.items() if cell[0] == world}
    if world == 2:
        cases |= {name: (name, model, layout, {}) for name, (model, layout, *_) in FAULTS.items()}
    return dict(zip(cases, run_ranks(probe_checks.sweep, world, list(cases.values()), timeout=400)[0], strict=True))


@pytest.mark.parametrize("name", SOUND)
def test_sound_gradients_agree_with_the_loss(name: str):
    assert results(SOUND[name][0])[name] == []


@pytest.mark.parametrize("name", FAULTS)
def test_agreement_on_a_wrong_gradient_is_found(name: str):
    _, _, kind, cause, group, everything = FAULTS[name]
    found = results(2)[name]
    assert (kind, cause) in [(k, c) for k, c, _ in found], found
    assert next(g for k, _, g in found if k == kind).startswith(group)
    assert everything == any("linear_qkv" in k for k, _, _ in found)

"""Gradients that nobody reduces by default: with our hooks they equal those of one process on every layout (P1, P2, P13)."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import replica_checks
from ranks import run_ranks
from replica_extras import DECLARED

TP2 = dict(tensor_model_parallel_size=2, sequence_parallel=True)
PP2 = dict(pipeline_model_parallel_size=2)
DENSE = {"num_moe_experts": None, "moe_shared_expert_intermediate_size": None, "moe_aux_loss_coeff": 0.0}
NO_EXPERTS = tuple(kind for kind in DECLARED if "expert" not in kind)
TWO = {
    "tensor": (TP2, {}),
    "pipeline": (PP2, {}),
    "virtual pipeline": ({**PP2, "virtual_pipeline_model_parallel_size": 2}, {}),
    "data": ({}, {"overlap": True, "bucket_size": 2000}),
    "experts": (dict(expert_model_parallel_size=2), {}),
    "tensor, no sequence": (dict(tensor_model_parallel_size=2), {"model": DENSE, "kinds": NO_EXPERTS}),
}
FOUR = {
    "all": ({**TP2, **PP2, "expert_model_parallel_size": 2}, {}),
    "expert tensor": ({**TP2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2}, {}),
    "tensor, data, overlap": (TP2, {"overlap": True, "bucket_size": 2000}),
    "the same with megatron's sums": (TP2, {"overlap": True, "bucket_size": 2000, "hooks": False}),
}


@cache
def oracle(dense: bool = False) -> dict[str, Any]:
    return run_ranks(replica_checks.extra_gradients, 1, {}, {"model": DENSE, "kinds": NO_EXPERTS} if dense else {})[0]


@cache
def found(world: int) -> dict[str, dict[str, Any]]:
    cases = TWO if world == 2 else FOUR
    return dict(zip(cases, run_ranks(replica_checks.sweep, world, list(cases.values()))[0], strict=True))


@pytest.mark.parametrize("world, name", [*((2, name) for name in TWO), *((4, name) for name in FOUR)])
def test_every_kind_of_copy_equals_one_process(world: int, name: str):
    result, expected = found(world)[name], oracle("no sequence" in name)
    assert result["spread"] == 0, "copies hold different gradients"
    assert result["losses"] == pytest.approx(expected["losses"], rel=2e-6)
    assert result["norm"] == pytest.approx(expected["norm"], rel=1e-5)
    assert result["grads"].keys() == expected["grads"].keys()
    for key, gradient in expected["grads"].items():
        off = float((result["grads"][key] - gradient).abs().max() / gradient.abs().max())
        assert off <= 2e-5, f"{key}: {off:.2e}"  # the second step's: Adam has amplified the first step's rounding


@pytest.mark.parametrize("world, name", [*((2, name) for name in TWO), *((4, name) for name in FOUR)])
def test_hooks_send_each_partial_gradient_once_a_step(world: int, name: str):
    result = found(world)[name]
    assert result["bytes"] == [result["least"]] * 2  # 4 microbatches a step; the first step learns, the second overlaps
    nothing_partial = name in ("data", "experts")
    assert (result["least"] == 0) == nothing_partial

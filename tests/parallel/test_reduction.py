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
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert result["norm"] == pytest.approx(expected["norm"], rel=1e-6)
    assert result["grads"].keys() == expected["grads"].keys()
    for key, gradient in expected["grads"].items():
        off = float((result["grads"][key] - gradient).abs().max() / (1e-5 * gradient.abs().max() + 1e-9))
        assert off <= 1, f"{key}: {off:.2f} times P13's tolerance"


@pytest.mark.parametrize("world, name", [*((2, name) for name in TWO), *((4, name) for name in FOUR)])
def test_hooks_send_each_partial_gradient_once_a_step(world: int, name: str):
    result = found(world)[name]
    assert result["bytes"] == [result["least"]] * 2  # 4 microbatches a step; the first step learns, the second overlaps
    nothing_partial = name in ("data", "experts")
    assert (result["least"] == 0) == nothing_partial


@cache
def plain(world: int) -> list[dict[str, Any]]:
    cases: list[Any] = [(True, {}), (False, {}), (True, {}, True), (True, {"moe_token_dispatcher_type": "allgather"})]
    return run_ranks(replica_checks.plain_sweep, world, cases)[0]


@pytest.mark.parametrize("world", [2, 4])
def test_experts_without_ddp_equal_one_process_only_with_hooks(world: int):
    """P1: EP 2 and 4 against one process, FP32, to 1e-6."""
    expected = plain(1)[0]["grads"]
    hooked, bare, _, allgather = plain(world)
    for found in (hooked, allgather):
        assert found["spread"] == 0 and found["bytes"] == found["least"]
        assert found["grads"].keys() == expected.keys()
        for name, gradient in expected.items():
            assert float((found["grads"][name] - gradient).abs().max()) <= 1e-6 * float(gradient.abs().max()), name
    off = {name: float((bare["grads"][name] - g).abs().max() / g.abs().max()) for name, g in expected.items()}
    assert bare["spread"] > 0.01
    assert all((value > 0.05) == ("local_experts" not in name) for name, value in off.items()), off


def test_bf16_gradients_travel_in_fp32():
    """The sum of two ranks' BF16 gradients, rounded once: what FP32 addition gives."""
    found = plain(2)[2]
    assert found["spread"] == 0 and found["bytes"] == found["least"]  # 4 bytes an element


WITHOUT = [  # (a hook taken away, layout)
    ("table", TP2), ("lora_a", TP2), ("head_scale", TP2), ("shared_scale", PP2),
]  # fmt: skip


@cache
def mutated() -> list[dict[str, Any]]:
    etp = {**TP2, "expert_tensor_parallel_size": 2}
    return run_ranks(replica_checks.sweep, 2, [(layout, {"without": kind, "steps": 1}) for kind, layout in [*WITHOUT, ("expert_a", etp)]])[0]


@pytest.mark.parametrize("number, kind", list(enumerate([kind for kind, _ in WITHOUT] + ["expert_a"])))
def test_without_a_hook_copies_differ(number: int, kind: str):
    """Each hook is needed: one taken away shows in the copies' gradients."""
    assert mutated()[number]["spread"] > 1e-4


def test_what_nobody_declared_is_refused_by_name():
    declared = {kind: said for kind, said in DECLARED.items() if kind not in ("table", "expert_a", "shared_scale")}
    with pytest.raises(AssertionError) as caught:
        run_ranks(replica_checks.extra_gradients, 2, {**TP2, "expert_tensor_parallel_size": 2}, {"declared": declared})
    text = str(caught.value)
    for name, line in (("table", 'tensor="sequence"'), ("shared_scale", 'tensor="sequence"'), ("local_experts.3.linear_fc1.expert_a", 'shard="expert"')):
        assert any(name in row and line in row for row in text.splitlines()), name
    assert "lora_a" not in text.split("PlacementError:")[-1]
    with pytest.raises(AssertionError, match=r'shared_scale: pipeline stages 0, 1 each hold a copy.*pipeline="partial"'):
        run_ranks(replica_checks.extra_gradients, 2, PP2, {"declared": declared, "kinds": ("shared_scale",)})

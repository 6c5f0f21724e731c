"""S2: LoRA on every layout is LoRA on one process; a fresh adapter changes nothing, a merged one is itself; the base stays."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lora_checks
import pytest
import torch
from ranks import run_ranks

LORA = {"rank": 4, "alpha": 6}
DENSE = dict(num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2, qk_layernorm=True)
MOE = {**DENSE, "num_moe_experts": 4, "moe_ffn_hidden_size": 48, "moe_shared_expert_intermediate_size": 32, "moe_grouped_gemm": False}
LATENT = dict(
    num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, multi_latent_attention=True, q_lora_rank=24, kv_lora_rank=16,
    qk_head_dim=16, qk_pos_emb_head_dim=8, v_head_dim=16, layernorm_epsilon=1e-6,
)  # fmt: skip
TP2, SP = dict(tensor_model_parallel_size=2), dict(sequence_parallel=True)
PP2, EP2 = dict(pipeline_model_parallel_size=2), dict(expert_model_parallel_size=2)
ETP2 = dict(expert_tensor_parallel_size=2)


def case(model: dict[str, Any], parallel: dict[str, Any], **lora: Any) -> dict[str, Any]:
    return {"model": model, "parallel": {"use_distributed_optimizer": False, **parallel}, "lora": {**LORA, **lora}, "audit": {"interval": None}}


GROUPED = {**MOE, "moe_grouped_gemm": True}
ALONE = {
    "dense": case(DENSE, {}),
    "moe": case(MOE, {}),
    "latent": case(LATENT, {}),
    "some": case(DENSE, {}, target_modules=["q_proj", "v_proj", "up_proj"], use_rslora=True),
}
CELLS = {
    "dense-tp2": (2, case(DENSE, TP2)),
    "dense-tp2-sp": (2, case(DENSE, {**TP2, **SP})),
    "dense-pp2": (2, case(DENSE, PP2)),
    "dense-cp2": (2, case(DENSE, dict(context_parallel_size=2))),
    "dense-dp2": (2, case(DENSE, {})),
    "some-tp2-sp": (2, case(DENSE, {**TP2, **SP}, target_modules=["q_proj", "v_proj", "up_proj"], use_rslora=True)),
    "moe-ep2": (2, case(MOE, EP2)),
    "moe-tp2-sp": (2, case(MOE, {**TP2, **SP})),
    "moe-tp2-sp-etp2": (2, case(MOE, {**TP2, **SP, **ETP2})),
    "moe-grouped-ep2": (2, case(GROUPED, EP2)),
    "moe-grouped-tp2-sp-etp2": (2, case(GROUPED, {**TP2, **SP, **ETP2})),
    "latent-tp2": (2, case(LATENT, TP2)),
    "latent-tp2-sp": (2, case(LATENT, {**TP2, **SP})),
    "moe-tp2-pp2-ep2-sp": (4, case(MOE, {**TP2, **PP2, **EP2, **SP})),
    "moe-tp2-sp-ep2-etp2": (4, case(MOE, {**TP2, **SP, **EP2, **ETP2})),
}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """All layouts, a launch for each size of the world."""
    results: dict[str, Any] = dict(zip(ALONE, run_ranks(lora_checks.steps, 1, list(ALONE.values()))[0]))
    for world in (2, 4):
        cells = {name: cell for name, (size, cell) in CELLS.items() if size == world}
        results |= zip(cells, run_ranks(lora_checks.steps, world, list(cells.values()))[0])
    return results


@pytest.mark.parametrize("name", CELLS)
def test_layout_equals_one_process(found: dict[str, Any], name: str):
    """P13 and P5, with adapters whose B is not 0."""
    here, alone = found[name], found[name.split("-")[0]]
    assert here["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert here["norm"] == pytest.approx(alone["norm"], rel=2e-6)
    assert here["grads"].keys() == alone["grads"].keys() and here["grads"]
    for parameter, gradient in alone["grads"].items():
        assert float(gradient.abs().max()) > 0, f"{parameter} has no gradient: nothing would be compared"
        difference = float((here["grads"][parameter] - gradient).abs().max())
        assert difference <= 1e-5 * float(gradient.abs().max()) + 1e-9, (parameter, difference)


@pytest.mark.parametrize("name", [*ALONE, *CELLS])
def test_the_base_stays_and_adapters_can_be_taken_off_or_merged(found: dict[str, Any], name: str):
    result = found[name]
    assert result["fresh"] == result["base"], "B = 0: bitwise the base, before any step and after one with the adapters off"
    assert abs(result["adapted"] - result["base"]) > 1e-4
    assert result["merged"] == pytest.approx(result["adapted"], rel=1e-6)
    assert result["moved"] and all(".lora_" in moved for moved in result["moved"]), "of the base every bit stays"
    assert {name for name in result["names"] if ".lora_" in name} == result["moved"]


def test_what_is_adapted(found: dict[str, Any]):
    """Every linear layer of the decoder under its PEFT name; none of the embedding, the head, norms and routers."""
    layer = "decoder.layers.0."
    assert {name.removeprefix(layer + "mlp.") for name in found["moe"]["grads"] if name.startswith(layer + "mlp.experts.local_experts.3.")} == {
        f"experts.local_experts.3.linear_{linear}.lora_{factor}_{part}"
        for factor in "AB" for linear, part in (("fc1", "gate_proj"), ("fc1", "up_proj"), ("fc2", "down_proj"))
    }  # fmt: skip
    parts = {name.rpartition("_")[0].rpartition("_")[2] + "_" + name.rpartition("_")[2] for name in found["dense"]["grads"]}
    assert parts == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert not any(word in name for name in found["moe"]["grads"] for word in ("embedding", "output_layer", "norm", "router"))
    # r (in + out): q 64 + 64, k and v 64 + 32, o 64 + 64, gate, up and down 64 + 96; two layers
    assert found["dense"]["held"] == 2 * 4 * (128 + 96 + 96 + 128 + 3 * 160)
    assert {name.rpartition("lora_")[2] for name in found["some"]["grads"]} == {f"{x}_{part}" for x in "AB" for part in ("q_proj", "v_proj", "up_proj")}


def test_how_adapters_are_declared(found: dict[str, Any]):
    """Column-parallel: A copied, partial only where tokens are cut. Experts: partial over expert-tensor ranks, never over tensor ones."""
    layer = "decoder.layers.0.self_attention."
    without, cut = found["dense-tp2"]["placements"], found["dense-tp2-sp"]["placements"]
    assert without[f"{layer}linear_qkv.lora_A_q_proj"][1]["tensor"] == "full" and cut[f"{layer}linear_qkv.lora_A_q_proj"][1]["tensor"] == "partial"
    assert cut[f"{layer}linear_qkv.lora_A_q_proj"][2]["tensor"] == "hook in backward"
    assert cut[f"{layer}linear_qkv.lora_B_q_proj"][0] == ("tensor",) and cut[f"{layer}linear_proj.lora_A_o_proj"][0] == ("tensor",)
    expert = found["moe-tp2-sp-etp2"]["placements"]["decoder.layers.0.mlp.experts.local_experts.0.linear_fc2.lora_B_down_proj"]
    assert expert[0] == ("expert",) and expert[1] == {"expert_data": "partial", "expert_tensor": "partial"}


def test_the_auditor_finds_an_adapter_that_is_not_reduced():
    found = run_ranks(lora_checks.audits, 2, case(DENSE, {**TP2, **SP}), case(MOE, {**TP2, **SP, **ETP2}))[0]
    assert found["none"] == found["experts none"] == []
    for fault in ("hooks", "declaration"):
        assert any("linear_qkv.lora_A_q_proj over tensor" in line and 'tensor="partial"' in line for line in found[fault]), found[fault]
        assert any("lora_B_o_proj" in line for line in found[fault])
        assert not any("lora_B_q_proj" in line for line in found[fault]), "cut, not copied"
    assert any("local_experts" in line and "lora_A_gate_proj" in line for line in found["experts hooks"]), found["experts hooks"]


def test_the_probe_agrees_with_the_loss():
    """Grouped experts are probed one by one, with their adapters."""
    assert run_ranks(lora_checks.probed, 2, case(GROUPED, {**TP2, **SP, **ETP2}))[0] == []


def test_a_checkpoint_has_the_adapters_alone_and_opens_on_another_layout(tmp_path: Path):
    """Saved on TP2 PP2 EP2 with SP and the sharded optimizer, opened on one rank and on ETP2."""
    sharded = {"use_distributed_optimizer": True}
    there = run_ranks(lora_checks.save_and_load, 4, case(MOE, {**TP2, **PP2, **EP2, **SP, **sharded}), str(tmp_path), None)[0]
    elements = sum(full.numel() for full in there["weights"].values())
    assert all(".lora_" in key for key in there["stored"]), "no base"
    weights = {key: math.prod(shape) for key, shape in there["stored"].items() if not key.startswith("optimizer.")}
    assert sum(weights.values()) == elements and len(there["stored"]) == 4 * len(weights), "adapters, their masters and two moments"
    for world, parallel in ((1, sharded), (2, {**TP2, **SP, **ETP2, **sharded})):
        here = run_ranks(lora_checks.save_and_load, world, case(MOE, parallel), str(tmp_path), there["path"])[0]
        assert here["weights"].keys() == there["weights"].keys()
        assert all(torch.equal(here["weights"][name], full) for name, full in there["weights"].items())
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-6) and here["norm"] == pytest.approx(there["norm"], rel=1e-5)

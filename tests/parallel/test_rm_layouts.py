"""Layout invariance of reward models: loss, every metric and every gradient, heads included, equal those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import rm_layout_checks
import torch
from ranks import run_ranks

DENSE = dict(num_layers=4, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2, qk_layernorm=True)
TIED = {**DENSE, "share_embeddings_and_output_weights": True}
MOE = {**DENSE, "num_moe_experts": 4, "moe_ffn_hidden_size": 48}
SP2, TP2 = dict(tensor_model_parallel_size=2, sequence_parallel=True), dict(tensor_model_parallel_size=2)
PP2, CP2 = dict(pipeline_model_parallel_size=2), dict(context_parallel_size=2)


def case(model: dict[str, Any], parallel: dict[str, Any], lora: int | None = None) -> dict[str, Any]:
    """lora: rank of adapters, beside which the heads are trained whole."""
    adapters = {} if lora is None else {"lora": {"rank": lora}}
    return {"model": model, "parallel": {"use_distributed_optimizer": False, **parallel}, "rm": {"heads": rm_layout_checks.HEADS}, **adapters}


CELLS = {
    "sp2": (2, case(DENSE, SP2)),
    "tp2": (2, case(DENSE, TP2)),
    "pp2": (2, case(DENSE, PP2)),
    "cp2": (2, case(DENSE, CP2)),
    "dp2": (2, case(DENSE, {})),
    "tied-pp2": (2, case(TIED, PP2)),
    "moe-ep2": (2, case(MOE, dict(expert_model_parallel_size=2))),
    "sp2-pp2": (4, case(DENSE, {**SP2, **PP2})),
    "sp2-cp2": (4, case(DENSE, {**SP2, **CP2})),
    "lora-sp2": (2, case(DENSE, SP2, lora=4)),
    "lora-moe-ep2": (2, case(MOE, dict(expert_model_parallel_size=2), lora=4)),
    "lora-pp2": (2, case(DENSE, PP2, lora=4)),
    "vpp": (2, case(DENSE, {**PP2, "virtual_pipeline_model_parallel_size": 2})),
}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """All layouts, a launch for each size of the world; and one whose heads nobody reduces."""
    alone = {"dense": case(DENSE, {}), "tied": case(TIED, {}), "moe": case(MOE, {}), "lora": case(DENSE, {}, lora=4), "lora-moe": case(MOE, {}, lora=4)}
    results: dict[str, Any] = dict(zip(alone, run_ranks(rm_layout_checks.steps, 1, list(alone.values()))[0]))
    for world in (2, 4):
        cells = {name: cell for name, (size, cell) in CELLS.items() if size == world}
        results |= zip(cells, run_ranks(rm_layout_checks.steps, world, list(cells.values()))[0])
    results["unreduced"] = run_ranks(rm_layout_checks.steps, 2, [CELLS["sp2"][1]], "full")[0][0]
    return results


def reference(found: dict[str, Any], name: str) -> Any:
    return found[next((base for base in ("lora-moe", "lora", "moe", "tied") if name.startswith(f"{base}-")), "dense")]


def furthest(here: dict[str, torch.Tensor], alone: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest difference of each gradient, in units of what is allowed."""
    assert here.keys() == alone.keys()
    return {name: float((here[name] - full).abs().max()) / (1e-5 * float(full.abs().max()) + 1e-9) for name, full in alone.items()}


@pytest.mark.parametrize("name", CELLS)
def test_layout_equals_one_process(found: dict[str, Any], name: str):
    here, alone = found[name], reference(found, name)
    assert here["count"] == alone["count"]
    assert here["means"].loss == pytest.approx(alone["means"].loss, rel=1e-6)
    assert here["means"].metrics.keys() == alone["means"].metrics.keys()
    for metric, value in alone["means"].metrics.items():
        assert here["means"].metrics[metric] == pytest.approx(value, rel=1e-5, abs=1e-5), metric
    distances = furthest(here["grads"], alone["grads"])
    assert max(distances.values()) <= 1, distances


@pytest.mark.parametrize("name", CELLS)
def test_gradients_in_float64(found: dict[str, Any], name: str):
    """1e-6 with room: in FP64 a layout changes rounding alone, heads of every loss included."""
    here, alone = found[name]["double"], reference(found, name)["double"]
    assert here.keys() == alone.keys() and any(parameter.startswith("heads.") for parameter in here)
    for parameter, gradient in alone.items():
        assert gradient.dtype == torch.float64 and float(gradient.abs().max()) > 0, parameter
        difference = float((here[parameter] - gradient).abs().max())
        assert difference <= 1e-10 * float(gradient.abs().max()), (parameter, difference)


def test_float64_gradients_are_those_of_float32(found: dict[str, Any]):
    for parameter, gradient in found["dense"]["double"].items():
        torch.testing.assert_close(found["dense"]["grads"][parameter].double(), gradient, rtol=0, atol=1e-4 * float(gradient.abs().max()))


def test_every_head_is_trained_and_counted(found: dict[str, Any]):
    alone = found["dense"]
    heads = {name for name in alone["grads"] if name.startswith("heads.")}
    assert heads == {
        "heads.quality_head.weight", "heads.returns_head.weight", "heads.returns_head.bias", "heads.stars_head.weight", "heads.stars_head.constants",
        "heads.gap_head.weight", "heads.gap_head.bias", "heads.gap_head.constants",
    }  # fmt: skip
    assert all(float(alone["grads"][name].abs().max()) > 1e-4 for name in heads)
    assert "output_layer.weight" not in alone["grads"], "no model that speaks"
    # Three microbatches hold rows: pairs weigh 1, 1, .25 and 1; single answers .25 and 1, with three labels each.
    assert alone["count"] == pytest.approx(2 * 1.0 + 0.25 + 1.0 + 3 * (0.25 + 1.0))


def test_a_head_whose_gradient_is_not_reduced_is_seen(found: dict[str, Any]):
    """The heads declared full on every tensor rank, which under sequence parallelism they are not."""
    distances = furthest(found["unreduced"]["grads"], found["dense"]["grads"])
    assert all((distance > 1000) == name.startswith("heads.") for name, distance in distances.items() if distance > 1 or name.startswith("heads.")), distances
    here, alone = found["unreduced"]["double"], found["dense"]["double"]
    off = {name for name, full in alone.items() if float((here[name] - full).abs().max()) > 1e-6 * float(full.abs().max())}
    assert off == {name for name in alone if name.startswith("heads.")}, off


def test_the_loss_is_the_sum_of_the_heads_means(found: dict[str, Any]):
    means = found["dense"]["means"]
    weights = {name: head.get("weight", 1.0) for name, head in rm_layout_checks.HEADS.items()}
    assert means.loss == pytest.approx(sum(weight * means.metrics[f"{name}/loss"] for name, weight in weights.items()), rel=1e-5)

"""Layout invariance of DPO: loss, every metric and every gradient equal those of one process on the same pairs."""

from __future__ import annotations

from typing import Any

import dpo_layout_checks
import pytest
import torch
from ranks import run_ranks

DENSE = dict(num_layers=4, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2, qk_layernorm=True)
MOE = {**DENSE, "num_moe_experts": 4, "moe_ffn_hidden_size": 48}
TP2, PP2 = dict(tensor_model_parallel_size=2, sequence_parallel=True), dict(pipeline_model_parallel_size=2)


def case(model: dict[str, Any], parallel: dict[str, Any], loss: str = "sigmoid", share: bool = False) -> dict[str, Any]:
    return {"model": model, "parallel": {"use_distributed_optimizer": False, **parallel}, "dpo": {"loss": loss, "share_prompt": share}}


CELLS = {
    "shared": (1, case(DENSE, {}, share=True)),
    "moe-shared": (1, case(MOE, {}, share=True)),
    "shared-dp2": (2, case(DENSE, {}, share=True)),
    "tp2": (2, case(DENSE, TP2)),
    "pp2": (2, case(DENSE, PP2)),
    "cp2": (2, case(DENSE, dict(context_parallel_size=2))),
    "dp2": (2, case(DENSE, {})),
    "moe-ep2": (2, case(MOE, dict(expert_model_parallel_size=2))),
    "tp2-pp2": (4, case(DENSE, {**TP2, **PP2})),
    "rpo-cp2": (2, case(DENSE, dict(context_parallel_size=2), "rpo")),
}


def base_of(name: str) -> str:
    """What one process found for the same model and loss, each answer with a prompt of its own."""
    prefix = name.split("-")[0]
    return prefix if prefix in ("moe", "rpo") else "dense"


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """All layouts, a launch for each size of the world."""
    results: dict[str, Any] = {}
    alone = {"dense": case(DENSE, {}), "moe": case(MOE, {}), "rpo": case(DENSE, {}, "rpo")}
    results |= zip(alone, run_ranks(dpo_layout_checks.steps, 1, list(alone.values()))[0])
    for world in (1, 2, 4):
        cells = {name: cell for name, (size, cell) in CELLS.items() if size == world}
        ranks = run_ranks(dpo_layout_checks.steps, world, list(cells.values()))
        for index, name in enumerate(cells):
            results[name] = {**ranks[0][index], "policy_is_reference": all(rank[index]["policy_is_reference"] for rank in ranks)}
    return results


@pytest.mark.parametrize("name", CELLS)
def test_layout_equals_one_process(found: dict[str, Any], name: str):
    here, alone = found[name], found[base_of(name)]
    assert here["count"] == alone["count"] == 4 * 0.25 + 3 * 1.0, "weights, once each"
    assert here["means"].loss == pytest.approx(alone["means"].loss, rel=1e-6)
    assert here["means"].metrics.keys() == alone["means"].metrics.keys()
    for metric, value in alone["means"].metrics.items():
        assert here["means"].metrics[metric] == pytest.approx(value, rel=1e-5, abs=1e-6), metric
    assert here["grads"].keys() == alone["grads"].keys()
    for parameter, gradient in alone["grads"].items():
        difference = float((here["grads"][parameter] - gradient).abs().max())
        assert difference <= 1e-5 * float(gradient.abs().max()) + 1e-9, (parameter, difference)


@pytest.mark.parametrize("name", CELLS)
def test_gradients_in_float64(found: dict[str, Any], name: str):
    """1e-6 with room: in FP64 a layout changes rounding alone. What is left in FP32 (above) is that rounding, 2^29 times as large."""
    here, alone = found[name]["double"], found[base_of(name)]["double"]
    assert here.keys() == alone.keys()
    for parameter, gradient in alone.items():
        assert gradient.dtype == torch.float64 and float(gradient.abs().max()) > 0, parameter
        difference = float((here[parameter] - gradient).abs().max())
        assert difference <= 1e-10 * float(gradient.abs().max()), (parameter, difference)


def test_float64_gradients_are_those_of_float32(found: dict[str, Any]):
    for parameter, gradient in found["dense"]["double"].items():
        torch.testing.assert_close(found["dense"]["grads"][parameter].double(), gradient, rtol=0, atol=1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize("name", [*CELLS, "dense", "moe"])
def test_policy_is_the_reference_before_the_first_update(found: dict[str, Any], name: str):
    """O15: two models built apart give the same log-probs, bitwise, and not those that were given by hand."""
    assert found[name]["policy_is_reference"]


def test_the_loss_is_the_formula(found: dict[str, Any]):
    """From the metrics' own definition: -log sigma of weighted pairs is at least log(1 + exp(-mean margin)) (Jensen)."""
    means = found["dense"]["means"]
    margins = means.metrics["rewards/chosen"] - means.metrics["rewards/rejected"]
    assert means.metrics["rewards/margins"] == pytest.approx(margins, abs=1e-6)
    assert means.loss >= float(torch.nn.functional.softplus(torch.tensor(-margins))) - 1e-6
    assert found["rpo"]["means"].loss > means.loss + 1

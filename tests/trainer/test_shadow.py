"""The moving average of weights against its closed form, on layouts, through checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import shadow_checks
import torch
from ranks import run_ranks
from shadow_checks import DECAY

MODEL_4 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2, "sequence_parallel": True}
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one": (1, {}, {}),
    "dp2": (2, {}, {}),
    "dp2-bf16": (2, {}, {"precision": "bf16"}),
    "dp2-bf16-unsharded": (2, {"use_distributed_optimizer": False}, {"precision": "bf16"}),
    "unsharded": (1, {"use_distributed_optimizer": False}, {}),
    "tp2-pp2-ep2": (4, MODEL_4, {}),
}


def closed_form(history: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """d^n w_0 + (1 - d) sum of d^(n - i) w_i, in float64."""
    n = len(history) - 1
    factors = [DECAY**n, *((1 - DECAY) * DECAY ** (n - i) for i in range(1, n + 1))]
    return {name: torch.stack([factor * weights[name].double() for factor, weights in zip(factors, history)]).sum(0) for name in history[0]}


@pytest.mark.parametrize("case", CASES)
def test_the_average_is_its_closed_form_and_resumes(case: str, tmp_path: Path):
    world, parallel, train = CASES[case]
    results = run_ranks(shadow_checks.run, world, parallel, tmp_path, train)
    found = results[0]
    expected, bf16 = closed_form(found["history"]), train.get("precision") == "bf16"
    moved = 0.0
    for name, average in found["average"].items():
        # In BF16 the streamed weights are rounded, the average is of the FP32 masters, and is rounded itself.
        tolerance = 2**-7 * float(expected[name].abs().max()) if bf16 else 1e-6
        torch.testing.assert_close(average.double(), expected[name], rtol=0, atol=tolerance, msg=name)
        moved = max(moved, float((average - found["history"][-1][name]).abs().max()))
    assert moved > 1e-3, "an average that is the last weight proves nothing"
    assert all(torch.equal(found["left"][name], weight) for name, weight in found["history"][-1].items())  # evaluation leaves them
    assert all(torch.equal(found["resumed"][name], average) for name, average in found["average"].items())
    assert all(torch.equal(found["resumed_weights"][name], weight) for name, weight in found["history"][-1].items())
    at_three = closed_form(found["history"][:4])
    for name, loaded in found["loaded"].items():  # the average alone, for use
        torch.testing.assert_close(loaded.double(), at_three[name], rtol=0, atol=2**-7 * float(at_three[name].abs().max()) if bf16 else 1e-6)
        assert torch.equal(found["trained"][name], found["history"][3][name])
    assert found["dtypes"] == {torch.float32}
    whole = sum(weight.numel() for weight in found["history"][0].values())
    if case.startswith("dp2"):
        owned = sum(result["owned"] for result in results)
        assert owned == (2 * whole if "unsharded" in case else whole)


def test_another_layout_opens_the_average(tmp_path: Path):
    found = run_ranks(shadow_checks.run, 4, MODEL_4, tmp_path, {})[0]
    alone = run_ranks(shadow_checks.open_elsewhere, 1, {}, found["path"])[0]
    expected = closed_form(found["history"][:4])
    assert alone.keys() == expected.keys()
    for name, average in alone.items():
        torch.testing.assert_close(average.double(), expected[name], rtol=0, atol=1e-6)


def test_a_checkpoint_without_an_average(tmp_path: Path):
    found = run_ranks(shadow_checks.without_average, 1, tmp_path)[0]
    assert all(torch.equal(found["average"][name], weight) for name, weight in found["weights"].items())
    assert "has no averaged weights: its run had no train.ema_decay" in found["refused"]

"""Layout invariance of KTO: the baseline over all ranks, every metric and every gradient equal those of one process."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import kto_layout_checks
import pytest
from ranks import run_ranks
from test_dpo_layouts import DENSE, MOE, PP2, TP2

BETA, WEIGHTS = 0.1, (1.5, 0.75)
CELLS = {"tp2": (DENSE, TP2), "pp2": (DENSE, PP2), "cp2": (DENSE, dict(context_parallel_size=2)), "dp2": (DENSE, {}), "moe-ep2": (MOE, dict(expert_model_parallel_size=2)), "tp2-pp2": (DENSE, {**TP2, **PP2})}


def case(folder: Path, model: dict[str, Any], parallel: dict[str, Any]) -> dict[str, Any]:
    """Seven answers and a row of padding: unequal ranks."""
    return {
        "output": str(folder / "run"),
        "model": model,
        "parallel": {"use_distributed_optimizer": False, **parallel},
        "data": dict(max_rows=7, validation_rows=0, sequence_length=256, packing=False, tokenizer=dict(vocab_size=300)),
        "train": dict(micro_batch_size=2, global_batch_size=8),
        "kto": dict(desirable_weight=WEIGHTS[0], undesirable_weight=WEIGHTS[1]),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("kto-layouts")
    alone = {"dense": case(folder, DENSE, {}), "moe": case(folder, MOE, {})}
    results: dict[str, Any] = dict(zip(alone, run_ranks(kto_layout_checks.steps, 1, list(alone.values()))[0]))
    cells = {name: case(folder, model, parallel) for name, (model, parallel) in CELLS.items()}
    for world in (2, 4):
        here = [name for name in cells if (4 if name == "tp2-pp2" else 2) == world]
        ranks = run_ranks(kto_layout_checks.steps, world, [cells[name] for name in here])
        results |= {name: {**ranks[0][index], "rows": [rank[index]["rows"] for rank in ranks]} for index, name in enumerate(here)}
    results["mutants"] = run_ranks(kto_layout_checks.mutants, 2, cells["dp2"])[0]
    return results


def test_one_process_is_the_formula(found: dict[str, Any]):
    """z and the loss from each document's log-prob scored on its own (eq. 7), in Python floats."""
    for name in ("dense", "moe"):
        documents, means = found[name]["documents"], found[name]["means"]
        ratios, others = ([x - ref for x, ref in zip(*documents[which])] for which in ("answers", "mismatched"))
        z = max(0.0, sum(others) / len(others))
        dealt = found["dp2" if name == "dense" else "moe-ep2"]["rows"]
        assert sorted(dealt[0] + dealt[1]) == list(range(7))
        by_rank = [max(0.0, sum(others[row] for row in rows) / len(rows)) for rows in dealt]
        assert z > 0.1 and abs(by_rank[0] - z) > 0.1 and abs(sum(by_rank) / 2 - z) > 0.05, "by rank it would be another number"
        losses = [
            WEIGHTS[0] / (1 + math.exp(BETA * (r - z))) if wanted else WEIGHTS[1] / (1 + math.exp(BETA * (z - r)))
            for r, wanted in zip(ratios, documents["desirable"], strict=True)
        ]
        assert means.metrics["kl"] == pytest.approx(z, rel=1e-5)
        assert means.loss == pytest.approx(sum(losses) / 7, rel=1e-5)
        wanted = [BETA * r for r, is_wanted in zip(ratios, documents["desirable"]) if is_wanted]
        assert means.metrics["rewards/chosen"] == pytest.approx(sum(wanted) / len(wanted), rel=1e-4)


@pytest.mark.parametrize("name", CELLS)
def test_layout_equals_one_process(found: dict[str, Any], name: str):
    check(found[name], found["moe" if name.startswith("moe") else "dense"])


@pytest.mark.parametrize("name", CELLS)
def test_gradients_in_float64(found: dict[str, Any], name: str):
    """1e-6, the baseline included: in FP64 a layout changes rounding alone."""
    here, alone = found[name]["double"], found["moe" if name.startswith("moe") else "dense"]["double"]
    assert here.keys() == alone.keys()
    for parameter, gradient in alone.items():
        assert str(gradient.dtype) == "torch.float64" and float(gradient.abs().max()) > 0, parameter
        difference = float((here[parameter] - gradient).abs().max())
        assert difference <= 1e-6 * float(gradient.abs().max()), (parameter, difference)


def check(here: dict[str, Any], alone: dict[str, Any]) -> None:
    assert here["count"] == alone["count"] == 7.0
    assert here["means"].loss == pytest.approx(alone["means"].loss, rel=1e-6)
    assert here["means"].metrics.keys() == alone["means"].metrics.keys()
    for metric, value in alone["means"].metrics.items():
        assert here["means"].metrics[metric] == pytest.approx(value, rel=1e-5, abs=1e-6), metric
    assert here["grads"].keys() == alone["grads"].keys()
    for parameter, gradient in alone["grads"].items():
        difference = float((here["grads"][parameter] - gradient).abs().max())
        assert difference <= 1e-5 * float(gradient.abs().max()) + 1e-9, (parameter, difference)


@pytest.mark.parametrize(
    "name",
    ["baseline of each rank", "own answers", "sums shifted by one token", "mean for sum", "kinds exchanged", "weights dropped", "denominator of the rank"],
)
def test_a_mistake_is_seen(found: dict[str, Any], name: str):
    with pytest.raises(AssertionError):
        check(found["mutants"][name], found["dense"])

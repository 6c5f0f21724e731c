"""A sweep over beta: where judges disagree DPO has an optimum, and its margin is logit(p) / beta (O8)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import dpo_checks
import pytest
from dpo_checks import metrics, recipe
from ranks import run_ranks

from megalign.config.errors import ConfigError
from megalign.config.schema import Recipe
from megalign.parallel.init import read_world
from megalign.sweep import sweep

BETAS = [1.0, 0.3, 0.1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three judges of four prefer A to B, in one batch: log-odds ln 3."""
    base = tmp_path_factory.mktemp("sweep")
    a, b = "Yes, the owl sleeps in the mill.", "No, there is no owl at all."
    pairs = [{"prompt": "Where is the owl?", "chosen": x, "rejected": y} for x, y in ((a, b), (a, b), (a, b), (b, a))]
    (base / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    run = recipe(
        base / "run", data={"train": str(base / "pairs.jsonl"), "validation_rows": 0, "max_rows": None}, optimizer={"lr": 3e-3, "weight_decay": 0.0},
        train={"max_steps": 120, "micro_batch_size": 4, "sample_prompts": 0},
    )  # fmt: skip
    for _ in range(2):  # the second one finds all runs finished
        run_ranks(dpo_checks.sweep, 1, run, BETAS)
    return base / "run"


def test_margin_is_the_log_odds_over_beta_and_drift_falls(folder: Path):
    rows = json.loads((folder / "sweep.json").read_text())
    assert [row["beta"] for row in rows] == sorted(BETAS)
    for row in rows:
        ends = metrics(folder / f"beta_{row['beta']:g}")[-1]
        # Half of the margins' mean: of four pairs with margins d, d, d, -d it is d / 2.
        assert row["margin"] == pytest.approx(math.log(3) / row["beta"] / 2, rel=0.05), row
        assert ends["loss"] == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4), abs=2e-3)
    drifts, margins = ([row[name] for row in rows] for name in ("drift", "margin"))
    assert drifts == sorted(drifts, reverse=True) and margins == sorted(margins, reverse=True)


def test_it_shares_one_reference_and_does_nothing_twice(folder: Path):
    assert (folder / "reference" / "made_from.json").exists() and not (folder / "beta_1" / "reference").exists()
    assert len(metrics(folder / "beta_1")) == 120
    picture = (folder / "sweep.svg").read_text()
    assert picture.count("beta 0.1<") == 2 and "margin of log-ratios" in picture


def test_a_loss_without_reference_is_refused():
    with pytest.raises(ConfigError, match="dpo.loss=simpo: a sweep over beta compares with a reference"):
        sweep(Recipe.model_validate({"dpo": {"loss": "simpo"}}), [0.1], read_world({}))


@pytest.mark.parametrize("betas", ["0,1", "one", ""])
def test_betas_that_are_none_are_refused(betas: str):
    from typer.testing import CliRunner

    from megalign.cli import app

    done = CliRunner().invoke(app, ["dpo", "dpo", "--betas", betas])
    assert done.exit_code == 2 and "no list of numbers above 0" in " ".join(done.output.split())

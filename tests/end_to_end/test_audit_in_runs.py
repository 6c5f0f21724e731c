"""`audit.on_failure` in whole runs with a fault: what is logged, what the report and the exit code say, what the weights are."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import audit_run_checks
import pytest
from audit_run_checks import BY, PARAMETER
from ranks import run_ranks
from sft_checks import metrics, recipe

WAYS = ("warn", "repair", "stop")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[tuple[str, float]]]]:
    """Six steps, looked at every second; rank 1's weight changes before the third."""
    folder = tmp_path_factory.mktemp("runs")
    plain = {"use_distributed_optimizer": False}
    train = {"max_steps": 6, "save_interval": 2, "sample_prompts": 0}
    recipes = [recipe(folder / way, parallel=plain, train=train, audit={"interval": 2, "on_failure": way}, logging={"report": True}) for way in WAYS]
    return folder, run_ranks(audit_run_checks.with_a_changed_weight, 2, recipes)


def audited(folder: Path) -> list[tuple[int, str]]:
    return [(row["step"], row["message"]) for row in metrics(folder, "event") if row["event"] == "audit"]


FOUND = f"{PARAMETER} over data/expert_data, rank 1: weights differ although gradients and moments agree: changed outside the optimizer since step 4, largest difference 0.0625"


def test_warn_tells_it_once_and_goes_on(runs):
    folder, ranks = runs
    assert [rank[0][0] for rank in ranks] == ["", ""]
    (step, told), (end, summary) = audited(folder / "warn")
    assert step == 4 and told.startswith(FOUND) and "\n    fix: find what writes to it outside optimizer.step()" in told
    assert end == 6 and summary.endswith(", 1 drift")
    assert ranks[1][0][1] - ranks[0][0][1] == pytest.approx(BY, rel=1e-4)
    page = (folder / "warn" / "report.html").read_text()
    assert PARAMETER in page and "changed outside the optimizer" in page and "1 drift" in page


def test_repair_gives_the_first_ranks_value_and_goes_on(runs):
    folder, ranks = runs
    assert [rank[1][0] for rank in ranks] == ["", ""]
    (step, told), (end, summary) = audited(folder / "repair")
    assert step == 4 and told.startswith(FOUND) and told.endswith("\n    repaired: every copy has the values of the first rank that holds it")
    assert end == 6 and summary.endswith(", 0 drift")
    assert ranks[0][1][1] == ranks[1][1][1]


def test_stop_ends_the_run_before_the_update(runs):
    folder, ranks = runs
    for rank in ranks:
        error, _ = rank[2]
        assert error.startswith(f"TrainingStopped: training stopped at step 4, parameter {PARAMETER}: the audit found 1 parameter:\n{FOUND}")
    last = metrics(folder / "stop", "event")[-1]
    assert last["event"] == "stop" and last["step"] == 4 and PARAMETER in last["message"]
    assert sorted(path.name for path in (folder / "stop" / "checkpoints").iterdir() if path.name.startswith("iter_"))[-1].endswith("2")
    assert [row["step"] for row in metrics(folder / "stop")] == [1, 2, 3]
    assert PARAMETER in (folder / "stop" / "report.html").read_text()


@cache
def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`megalign sft` where the expert-parallel group's gradients are left unreduced, as a shell sees it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    changes = (
        "model.num_layers=1", "model.hidden_size=32", "model.ffn_hidden_size=48", "model.moe_ffn_hidden_size=32", "parallel.pipeline_model_parallel_size=1",
        "parallel.use_distributed_optimizer=false", "parallel.unsynchronised=[expert_parallel]", "train.max_steps=2", "data.max_rows=30", "data.validation_rows=4",
        "optimizer.lr_warmup_steps=1", "train.sample_prompts=0", "logging.report=false", "train.exact_match=false",
    )  # fmt: skip
    return subprocess.run([sys.executable, "-m", "megalign", "sft", "quickstart", *changes, *arguments], capture_output=True, text=True, env=environment, timeout=300)


def test_a_run_that_is_stopped_ends_with_exit_code_1(tmp_path: Path):
    done = command(f"output={tmp_path / 'run'}", "audit.on_failure=stop")
    assert done.returncode == 1, done.stderr
    assert "training stopped at step 1, parameter decoder." in done.stderr and "a sum is missing since step 1" in done.stderr
    assert done.stderr.count("training stopped at step 1") == 1 and "Traceback" not in done.stderr

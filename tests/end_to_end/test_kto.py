"""`kto` from labelled answers to report: baseline, references, resumption, layouts, errors, the real files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import kto_checks
import numpy as np
import pytest
from kto_checks import curve, metrics, recipe
from ranks import run_ranks

from megalign.report.format import number as spell

NAMES = ("loss", "grad_norm", "kl")
SIDES = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


@pytest.fixture(scope="module")
def folder(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on one rank and on two, each in one launch."""
    base = tmp_path_factory.mktemp("kto")
    half = {"train": {"stop_at_step": 3}}
    demo = dict(validation_rows=8, sequence_length=2048, max_rows=60, tokenizer=dict(vocab_size=1024))
    two_steps = dict(train=dict(max_steps=2, micro_batch_size=1, sample_prompts=0), optimizer=dict(lr_warmup_steps=0))
    runs = [
        recipe(base / "cached", logging={"report": True}, train={"max_steps": 40, "eval_interval": 20}),
        recipe(base / "short"),
        recipe(base / "model", kto={"reference": "model"}),
        recipe(base / "halves", **half),
        recipe(base / "halves"),
        recipe(base / "apo", kto={"loss": "apo_zero_unpaired"}),
        recipe(base / "heavy", kto={"desirable_weight": 3.0, "undesirable_weight": 0.5}, train={"max_steps": 1}, optimizer={"lr_warmup_steps": 0}),
        recipe(base / "kto-demo", data={**demo, "train": str(shared_data / "demo_formats" / "kto_en_demo.json")}, **two_steps),
        recipe(base / "pairs-demo", data={**demo, "train": str(shared_data / "demo_formats" / "dpo_en_demo.json")}, **two_steps),
        recipe(base / "dpo-demo", data={**demo, "train": str(shared_data / "demo_formats" / "dpo_en_demo.json"), "sequence_length": 4096}, algorithm="dpo", **two_steps),
    ]
    assert run_ranks(kto_checks.train_all, 1, runs)[0] == [""] * len(runs)
    runs = [
        recipe(base / "tp2", parallel=TP2),
        recipe(base / "pp2", parallel={"pipeline_model_parallel_size": 2}, kto={"reference": "model"}),
        recipe(base / "dp2", **half),
        recipe(base / "dp2"),
    ]
    assert run_ranks(kto_checks.train_all, 2, runs)[0] == [""] * len(runs)
    return base


def test_it_learns_and_begins_where_the_reference_is(folder: Path):
    lines = metrics(folder / "cached")
    assert lines[0]["loss"] == pytest.approx(0.5, abs=1e-6) and lines[0]["kl"] == pytest.approx(0, abs=1e-4), "policy = reference: every loss is 1/2"
    assert all(line["kl"] >= 0 for line in lines) and max(line["kl"] for line in lines) > 0.1
    last = lines[-8:]
    assert sum(line["loss"] for line in last) / 8 < 0.45 and sum(line["rewards/margins"] for line in last if "rewards/margins" in line) > 1
    for line in lines:
        if "rewards/margins" in line:
            assert line["rewards/margins"] == pytest.approx(line["rewards/chosen"] - line["rewards/rejected"], abs=1e-6)
    events = [line["message"] for line in metrics(folder / "cached", "event") if line["event"] == "reference"]
    assert "computed, kept in" in events[0] and events[1].startswith("policy = reference at step 0")


def test_class_weights_scale_the_two_kinds(folder: Path):
    """At step 1 every unweighted loss is 1/2, so the mean weight follows from the labels in the batch."""
    (line,) = metrics(folder / "heavy")
    assert line["loss"] in [pytest.approx((3.0 * wanted + 0.5 * (4 - wanted)) / 8, abs=1e-5) for wanted in range(5)]
    (warning,) = [line["message"] for line in metrics(folder / "heavy", "event") if "desirable_weight" in line["message"]]
    assert "desirable and" in warning and "1 to 1.33" in warning


def test_a_second_model_is_the_cached_pass(folder: Path):
    for ours, theirs in zip(curve(folder / "model", *NAMES), curve(folder / "short", *NAMES), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert not (folder / "model" / "reference").exists()
    assert {file.name for file in (folder / "short" / "reference").iterdir()} == {
        "made_from.json", "train.npy", "validation.npy", "train_mismatched.npy", "validation_mismatched.npy",
    }  # fmt: skip


def test_resumption_is_exact(folder: Path):
    """Bitwise, the baseline included; also with two data-parallel ranks."""
    assert curve(folder / "halves", *NAMES) == curve(folder / "short", *NAMES)
    assert curve(folder / "short", *NAMES)[4][3] > 0, "a baseline that a new anchor would not have"
    assert [line["step"] for line in metrics(folder / "dp2")] == list(range(1, 9))


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2"])
def test_layouts_of_a_whole_run(folder: Path, layout: str):
    for ours, theirs in zip(metrics(folder / layout), metrics(folder / "short"), strict=True):
        for name in (*NAMES, *SIDES):
            assert (name in ours) == (name in theirs)
            if name in ours:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=5e-4), (ours["step"], name)


def test_apo_has_no_baseline(folder: Path):
    lines = metrics(folder / "apo")
    assert lines[0]["loss"] == pytest.approx(0.5, abs=1e-6) and all("kl" not in line for line in lines)
    assert {file.name for file in (folder / "apo" / "reference").iterdir()} == {"made_from.json", "train.npy", "validation.npy"}
    assert curve(folder / "apo", "loss") != curve(folder / "short", "loss")


@pytest.mark.parametrize("name, format, rows", [("kto-demo", "unpaired", 52), ("pairs-demo", "preference", 52), ("dpo-demo", "preference", 52)])
def test_the_demo_files_are_read_as_they_are(folder: Path, name: str, format: str, rows: int):
    counts = json.loads((folder / name / "data.json").read_text())["train"]
    (source,) = counts["sources"].values()
    assert source["format"] == format and source["rows_read"] == rows == counts["rows_kept"] + counts["truncated_away"] and not counts["bad"]
    assert counts["rows_kept"] >= 30
    first = metrics(folder / name)[0]
    assert len(metrics(folder / name)) == 2 and first["loss"] == pytest.approx(0.5 if name != "dpo-demo" else float(np.log(2)), abs=1e-5)


def test_the_report_shows_baseline_rewards_and_answers(folder: Path):
    page = (folder / "cached" / "report.html").read_text()
    judged = [sample for sample in map(json.loads, (folder / "cached" / "samples.jsonl").read_text().splitlines()) if "judged" in sample]
    assert len(judged) == 1 and judged[0]["judged"]["reward"] != 0
    kind = "desirable" if judged[0]["judged"]["desirable"] else "undesirable"
    assert all(text in page for text in (">Rewards<", "KL of policy from reference", f"{kind}, reward {spell(judged[0]['judged']['reward'])}"))


def test_stale_references_and_single_answers_are_errors(folder: Path, tmp_path: Path):
    cache = {"reference_cache": str(folder / "short" / "reference")}
    halves = recipe(folder / "halves", train={"max_steps": 10, "seed": 5})
    runs: list[dict[str, Any]] = [
        recipe(tmp_path / "a", kto=cache, train={"global_batch_size": 6}),
        recipe(tmp_path / "b", train={"micro_batch_size": 1, "global_batch_size": 1}),
        halves,
    ]
    pairing, single, seed = run_ranks(kto_checks.train_all, 1, runs)[0]
    assert pairing.startswith("RunError: stale reference log-probs") and "train_mismatched" in pairing
    assert single.startswith("ConfigError") and "train.global_batch_size" in single and "apo_zero_unpaired" in single
    assert seed.startswith("RunError") and "trained against another reference" in seed


def test_the_command_prints_its_first_answer(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    from typer.testing import CliRunner

    from megalign.cli import app

    shown = CliRunner().invoke(app, ["kto", "kto", f"output={tmp_path / 'run'}", "data.max_rows=40", "data.validation_rows=4", "--dry-run"])
    assert shown.exit_code == 0 and "effective batch" in shown.stdout and "assistant" in shown.stdout

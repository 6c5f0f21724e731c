"""`rm train` and `rm score` from data to report: heads, resumption, layouts, normalisation, ensembles, errors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rm_checks
import torch
from ranks import run_ranks
from rm_checks import COLD, LONGER, WARM, curve, metrics, recipe

NAMES = ("loss", "grad_norm", "accuracy", "margin", "mean_reward")
ONE_STEP: dict[str, Any] = {"train": {"max_steps": 1}, "optimizer": {"lr_warmup_steps": 0}}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
HEADS = {"heads": {"reward": {"loss": "bradley_terry"}, "right": {"loss": "binary"}, "words": {"loss": "regression", "scale": "log1p", "weight": 0.2}}}


def write_rows(folder: Path) -> tuple[Path, Path]:
    """Pairs of warm words above cold ones, and answers with labels: how many of six words are warm, whether more than half."""
    numbers = np.random.default_rng(7)

    def answer(warm: int) -> str:
        said = [*numbers.choice(WARM, warm), *numbers.choice(COLD, 6 - warm)]
        return " ".join(numbers.permutation(said)) + "."

    pairs, labelled = folder / "warm.jsonl", folder / "labelled.jsonl"
    chosen = [int(count) for count in numbers.integers(4, 7, 200)]
    pairs.write_text("".join(json.dumps({"prompt": f"Say {n}", "chosen": answer(count), "rejected": answer(6 - count)}) + "\n" for n, count in enumerate(chosen)))
    counts = [int(count) for count in numbers.integers(0, 7, 240)]
    labelled.write_text("".join(json.dumps({"prompt": f"Say {n}", "completion": answer(count), "labels": {"right": count > 3, "words": count}}) + "\n" for n, count in enumerate(counts)))
    return pairs, labelled


TWO = {"heads": {"quality": {"loss": "bradley_terry"}, "liked": {"loss": "bradley_terry"}}}


def write_disagreement(folder: Path) -> Path:
    """The pairs of `write_rows`, of which users like the other answer."""
    file = folder / "disagree.jsonl"
    lines = [json.loads(line) for line in (folder / "warm.jsonl").read_text().splitlines()]
    file.write_text("".join(json.dumps({**line, "labels": {"quality": 1, "liked": -1}}) + "\n" for line in lines))
    return file


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def adapted(base: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Adapters and a head, trained on a run of supervised training; dropout is asked for, and left out."""
    return {**recipe(output, **changes), "model": {"init_from": str(base / "sft")}, "lora": {"rank": 4, "dropout": 0.3}}


def scores(path: Path, key: str = "rewards", head: str = "reward") -> list[float]:
    return [row[key][head] for row in rows(path)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on one rank, all in one launch, and what they say of some answers."""
    base = tmp_path_factory.mktemp("rm")
    last = {"load_best_at_end": False}  # a stopped run is evaluated where it stops, and has more to choose from
    half = {"train": {"stop_at_step": 3, **last}}
    warm, labelled = map(str, write_rows(base))
    learn = {"train": LONGER, "data": {"train": warm, "max_rows": None, "validation_rows": 40}}
    runs = [
        recipe(base / "whole", train=last, logging={"report": True}),
        recipe(base / "halves", **half),
        recipe(base / "halves", train=last),
        recipe(base / "long", **learn, logging={"report": True}),
        recipe(base / "other", **{**learn, "train": {**LONGER, "seed": 7}}),
        recipe(base / "heads", rm=HEADS, train={**LONGER, "max_steps": 80}, data={"train": [warm, labelled], "max_rows": None, "validation_rows": 120}, logging={"report": True}),
        {**recipe(base / "sft", train={"max_steps": 4}), "name": "sft"},
        {**recipe(base / "from-sft", **ONE_STEP), "model": {"init_from": str(base / "sft")}},
        {**recipe(base / "from-rm", **ONE_STEP, data=learn["data"]), "model": {"init_from": str(base / "long")}},
        recipe(base / "two", rm=TWO, train=LONGER, data={"train": str(write_disagreement(base)), "max_rows": None, "validation_rows": 40}),
        adapted(base, base / "adapted", **learn, optimizer={"lr": 5e-3}),
        adapted(base, base / "adapted-whole", train=last),
        adapted(base, base / "adapted-halves", **half),
        adapted(base, base / "adapted-halves", train=last),
        {**recipe(base / "from-adapted", **ONE_STEP, data=learn["data"]), "model": {"init_from": str(base / "adapted")}},
    ]
    assert run_ranks(rm_checks.train_all, 1, runs, timeout=400)[0] == [""] * len(runs)
    pairs = base / "pairs.jsonl"
    said = [("Yes, gladly.", "No."), ("The fox lives in the forest.", "Forest the in."), ("x " * 900, "short")]
    pairs.write_text("".join(json.dumps({"prompt": f"Question {n}", "chosen": a, "rejected": b}) + "\n" for n, (a, b) in enumerate(said)))
    jobs = [(str(base / "long"), str(pairs), [], str(base / "scored.jsonl")), (f"{base / 'long'},{base / 'other'}", str(pairs), [], str(base / "both.jsonl"))]
    jobs.append((str(base / "adapted"), str(pairs), [], str(base / "adapted.jsonl")))
    assert run_ranks(rm_checks.score, 1, jobs)[0] == [""] * 3
    return base


def test_a_run_begins_at_log_2_and_learns(folder: Path):
    """Two answers at the same reward lose log 2; a fresh head gives rewards of order one, so the first loss is near it."""
    whole = curve(folder / "whole", *NAMES)
    assert [step for step, *_ in whole] == list(range(1, 7))
    long = [row[1] for row in curve(folder / "long", "loss")]
    assert abs(long[0] - math.log(2)) < 0.5 and np.mean(long[-5:]) < 0.2
    found = json.loads((folder / "long" / "rewards.json").read_text())["heads"]["reward"]["held_out"]
    assert found["pairs"] == 40 and found["accuracy"] > 0.9
    low, high = found["accuracy_interval"]
    assert low < found["accuracy"] <= high <= 1 and found["length_only_accuracy"] < 0.8
    last = metrics(folder / "long", "eval")[-1]
    assert last["eval_accuracy"] == pytest.approx(found["accuracy"]) and last["eval_margin"] == pytest.approx(found["margin"], rel=1e-4)


def test_resumption_is_exact(folder: Path):
    assert curve(folder / "whole", *NAMES) == curve(folder / "halves", *NAMES)
    assert json.loads((folder / "whole" / "rewards.json").read_text()) == json.loads((folder / "halves" / "rewards.json").read_text())


def test_rewards_are_normalised_on_the_reference_samples(folder: Path):
    """Mean 0 and standard deviation 1 over the answers of the validation rows, by the numbers kept with the checkpoint (R6)."""
    checkpoint = sorted((folder / "long" / "checkpoints").iterdir())[-1]
    kept = json.loads((checkpoint / "reward.json").read_text())["reward"]
    assert kept["count"] == 80 and "reward.json" in json.loads((checkpoint / "manifest.json").read_text())["files"]
    raw, normal = scores(folder / "scored.jsonl")[:4], scores(folder / "scored.jsonl", "normalised")[:4]
    assert normal == pytest.approx([(value - kept["mean"]) / kept["std"] for value in raw], abs=1e-5)
    report = json.loads((folder / "long" / "rewards.json").read_text())["heads"]["reward"]
    assert report["normalisation"] == kept and kept["std"] > 0.1


def test_heads_learn_from_the_rows_that_label_them(folder: Path):
    data = json.loads((folder / "heads" / "data.json").read_text())["train"]["labels"]
    assert data == {"reward": 200, "right": 120, "words": 120}, "the last 120 rows are held out, all of them labelled answers"
    found = {name: entry["held_out"] for name, entry in json.loads((folder / "heads" / "rewards.json").read_text())["heads"].items()}
    assert found["right"]["auc"] > 0.8 and found["right"]["auc_interval"][0] <= found["right"]["auc"] <= found["right"]["auc_interval"][1]
    assert found["words"]["spearman"] > 0.5 and found["right"]["rows"] == found["words"]["rows"] == 120 and found["reward"] == {"pairs": 0}
    assert found["right"]["base_rate"] < found["right"]["accuracy"] and found["words"]["pearson_interval"][0] > 0.3
    line = metrics(folder / "heads")[-1]
    assert line["loss"] == pytest.approx(line["reward/loss"] + line["right/loss"] + 0.2 * line["words/loss"], rel=1e-4)


def test_a_trained_model_is_where_a_reward_model_starts(folder: Path):
    """Tokenizer, template and every weight but the head's are those of the run, and a reward model's own head is kept."""
    identity = [json.loads((sorted((folder / name / "checkpoints").iterdir())[-1] / "meta.json").read_text())["identity"] for name in ("sft", "from-sft")]
    assert identity[0]["tokenizer"] == identity[1]["tokenizer"] and identity[0]["template_hash"] == identity[1]["template_hash"]
    fresh, after = curve(folder / "whole", "loss")[0], curve(folder / "from-sft", "loss")[0]
    assert fresh != after and abs(after[1] - math.log(2)) < 0.5
    assert curve(folder / "from-rm", "loss")[0][1] < 0.3, "the head that was trained"


def test_answers_are_scored_and_what_does_not_fit_is_said(folder: Path):
    found = rows(folder / "scored.jsonl")
    assert [(row["line"], row["answer"]) for row in found] == [(line, side) for line in (1, 2, 3) for side in ("chosen", "rejected")]
    assert found[4]["rewards"] == {"reward": None} and "longer than data.sequence_length" in found[4]["error"]
    assert all("error" not in row for row in found[:4]) and len({row["rewards"]["reward"] for row in found[:4]}) == 4


def test_quality_and_what_users_like_are_two_rewards(folder: Path):
    """R8: where they disagree on every pair, each head ranks by its own judges."""
    found = {name: entry["held_out"] for name, entry in json.loads((folder / "two" / "rewards.json").read_text())["heads"].items()}
    assert found["quality"]["pairs"] == found["liked"]["pairs"] == 40
    assert found["quality"]["accuracy"] > 0.9 and found["liked"]["accuracy"] > 0.9
    pair = rows(folder / "two" / "samples.jsonl")[0]
    assert pair["chosen"]["reward"] > pair["rejected"]["reward"], "the first head's"


def test_adapters_under_a_reward_model(folder: Path):
    """They learn, resume exactly, leave the model alone, and go on as a merged one."""
    found = json.loads((folder / "adapted" / "rewards.json").read_text())["heads"]["reward"]["held_out"]
    assert found["accuracy"] > 0.9 and found["pairs"] == 40
    assert curve(folder / "adapted-whole", *NAMES) == curve(folder / "adapted-halves", *NAMES) and len(curve(folder / "adapted-whole", "loss")) == 6
    (told,) = [line["message"] for line in metrics(folder / "adapted", "event") if line["event"] == "adapters"]
    assert "parameters of rank 4 are trained" in told and "the model is frozen" in told
    assert curve(folder / "from-adapted", "loss")[0][1] < 0.35, "adapters merged, head kept"


def test_a_merged_reward_model_is_that_with_adapters(folder: Path, tmp_path: Path):
    """transformers' rewards of the exported folder equal ours with the adapters on; adapters alone would lack the head."""
    from transformers import AutoModelForSequenceClassification

    ids, values, refused = run_ranks(rm_checks.merged, 1, str(folder / "adapted"), str(folder / "pairs.jsonl"), str(tmp_path / "hf"))[0]
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf", dtype=torch.float32, num_labels=1)
    with torch.no_grad():
        theirs = [loaded(torch.tensor([document])).logits[0, 0].item() for document in ids]
    assert len(theirs) == 5 and values == pytest.approx(theirs, rel=1e-4, abs=1e-5) and np.std(values) > 0.05
    assert refused.startswith("CheckpointError") and "whole weights and no adapters; leave out --adapter" in refused


def test_an_ensemble_is_pessimistic(folder: Path):
    """mean - alpha std of normalised rewards, population standard deviation (R15)."""
    both = rows(folder / "both.jsonl")[:4]
    for row in both:
        other = 2 * row["mean"]["reward"] - row["normalised"]["reward"]
        assert row["std"]["reward"] == pytest.approx(abs(row["normalised"]["reward"] - other) / 2, abs=1e-5)
        assert row["pessimistic"]["reward"] == pytest.approx(row["mean"]["reward"] - row["std"]["reward"], abs=1e-5)
    assert max(row["std"]["reward"] for row in both) > 0.01


def test_layouts_of_whole_runs(folder: Path, tmp_path: Path):
    """TP2 stopped and resumed, PP2, DP2, and a checkpoint of one process scored on two ranks: as one process."""
    runs = [
        recipe(tmp_path / "tp2", parallel=TP2),
        recipe(tmp_path / "tp2-halves", parallel=TP2, train={"stop_at_step": 3}),
        recipe(tmp_path / "tp2-halves", parallel=TP2),
        recipe(tmp_path / "pp2", parallel=PP2),
        recipe(tmp_path / "dp2", train={"micro_batch_size": 2}),
        adapted(folder, tmp_path / "tp2-adapted", parallel=TP2),
        {**recipe(tmp_path / "pp2-from-sft", parallel=PP2, **ONE_STEP), "model": {"init_from": str(folder / "sft")}},
    ]
    assert run_ranks(rm_checks.train_all, 2, runs)[0] == [""] * len(runs)
    alone = curve(folder / "whole", *NAMES)
    assert curve(tmp_path / "tp2-halves", *NAMES) == curve(tmp_path / "tp2", *NAMES)
    for name in ("tp2", "pp2", "dp2"):
        for ours, theirs in zip(curve(tmp_path / name, *NAMES), alone, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=2e-4), name
    for ours, theirs in zip(curve(tmp_path / "tp2-adapted", *NAMES), curve(folder / "adapted-whole", *NAMES), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=2e-4)
    assert curve(tmp_path / "pp2-from-sft", "loss")[0] == pytest.approx(curve(folder / "from-sft", "loss")[0], rel=1e-5)
    ways = {"tp2": ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"], "pp2": ["parallel.pipeline_model_parallel_size=2"], "cp2": ["parallel.context_parallel_size=2"], "dp2": []}
    jobs = [(str(folder / "long"), str(folder / "pairs.jsonl"), way, str(tmp_path / f"{name}.jsonl")) for name, way in ways.items()]
    jobs.append((str(folder / "adapted"), str(folder / "pairs.jsonl"), ways["tp2"], str(tmp_path / "adapted.jsonl")))
    assert run_ranks(rm_checks.score, 2, jobs)[0] == [""] * len(jobs)
    assert scores(tmp_path / "adapted.jsonl")[:4] == pytest.approx(scores(folder / "adapted.jsonl")[:4], rel=1e-4, abs=1e-5)
    for name in ways:
        assert scores(tmp_path / f"{name}.jsonl")[:4] == pytest.approx(scores(folder / "scored.jsonl")[:4], rel=1e-4, abs=1e-5), name


def test_mistakes_are_told(folder: Path, tmp_path: Path):
    labelled = tmp_path / "labelled.jsonl"
    labelled.write_text("".join(json.dumps({"prompt": f"Q{n}", "completion": "A", "labels": {"stars": n}}) + "\n" for n in range(8)))
    runs = [
        recipe(folder / "whole", rm={"heads": {"other": {}}}),
        recipe(tmp_path / "a", data={"train": str(labelled), "max_rows": None}, rm={"heads": {"stars": {"loss": "ordinal", "classes": 5}}}),
        recipe(tmp_path / "b", data={"train": str(labelled), "max_rows": None}),
        recipe(tmp_path / "c", data={"train": str(folder / "warm.jsonl"), "max_rows": None}, rm={"heads": {"reward": {}, "gap": {"loss": "weibull"}}}),
        {**recipe(tmp_path / "d"), "model": {"init_from": str(folder / "long"), "hidden_size": 64}},
    ]
    heads, classes, no_pair, no_label, shape = run_ranks(rm_checks.train_all, 1, runs)[0]
    assert heads.startswith("RunError") and "has other heads" in heads
    assert classes.startswith("DataError") and "3 of 8 rows are unusable" in classes and "label 'stars' is 5: head stars is ordinal, which takes whole numbers from 0 to 4" in classes
    assert no_pair.startswith("DataError") and "no head of rm.heads (reward: bradley_terry) learns from this row: its labels are stars" in no_pair
    assert no_label.startswith("DataError") and "no row with a label 'gap'" in no_label
    assert shape.startswith("ConfigError") and "model.hidden_size=64" in shape
    jobs = [(str(folder / "sft"), str(folder / "pairs.jsonl"), [], "x"), (f"{folder / 'long'},{folder / 'from-rm' / 'checkpoints' / 'nowhere'}", str(folder / "pairs.jsonl"), [], "x")]
    speaks, nowhere = run_ranks(rm_checks.score, 1, jobs)[0]
    assert "is no reward model" in speaks and "holds no complete checkpoint" in nowhere


def test_audit_has_a_part_for_each_kind_of_row(folder: Path, tmp_path: Path):
    """Pairs, labelled answers of known users, candidates with gold scores; the numbers that can be known are what they must be."""
    numbers = np.random.default_rng(0)
    pairs, labelled, ranked = (tmp_path / f"{name}.jsonl" for name in ("pairs", "labelled", "ranked"))
    words = [" ".join(["word"] * int(n)) for n in numbers.integers(3, 30, 60)]
    pairs.write_text("".join(json.dumps({"prompt": f"Q{n}", "chosen": f"A {words[n]}.", "rejected": f"B {words[-n - 1]}."}) + "\n" for n in range(60)))
    people = [{"id": f"u{n % 30}", "tenure": n % 30} for n in range(120)]
    labelled.write_text(
        "".join(json.dumps({"prompt": f"Q{n}", "completion": f"A {words[n % 60]}.", "labels": {"right": who["tenure"] > 14}, "user": who}) + "\n" for n, who in enumerate(people))
    )
    scores = numbers.normal(size=(24, 4)).round(3).tolist()
    ranked.write_text("".join(json.dumps({"instruction": f"Q{n}", "completions": [{"response": f"{n} {i}", "overall_score": s} for i, s in enumerate(row)]}) + "\n" for n, row in enumerate(scores)))
    jobs = [(str(folder / "heads"), str(file), head, str(tmp_path / f"{file.stem}.json")) for file, head in ((pairs, None), (labelled, "right"), (ranked, "reward"))]
    said = run_ranks(rm_checks.audit, 1, [*jobs, (str(folder / "whole"), None, None, "x"), (str(folder / "heads"), str(pairs), "nobody", "x")])[0]
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("pairs", "labelled", "ranked")}
    for line, part in zip(said, found.values()):
        assert line == (f"AuditFailed: flagged: {', '.join(part['flagged'])}" if part["flagged"] else "")
    assert {effect["trait"] for effect in found["pairs"]["probes"]} >= {"length", "format", "hedging"} and found["pairs"]["pairs"]["pairs"] == 60
    assert 0 <= found["pairs"]["length"]["share"] <= 1
    user = found["labelled"]["user"]
    assert user["features"] == ["tenure"] and user["user"] > 0.95 and user["flagged"] and "the user, not the text" in found["labelled"]["flagged"]
    best = found["ranked"]["best_of_n"]
    assert best["n"] == [1, 2, 4] and best["gold"][0] == pytest.approx(np.mean(scores), abs=1e-6) and best["gold"][2] <= np.max(scores, 1).mean() + 1e-9
    assert "give one: megalign rm audit CHECKPOINT FILE" in said[3] and "the model has reward, right, words" in said[4]


def test_the_policy_leaves_what_the_model_knows(folder: Path, tmp_path: Path):
    """R18: answers like those it was measured on raise no alarm; ones pushed by the reward, and judges who no longer agree, do."""
    lines = rows(folder / "warm.jsonl")[-40:]
    same, pushed, disagreed = (tmp_path / f"{name}.jsonl" for name in ("same", "pushed", "disagreed"))
    same.write_text("".join(json.dumps(line) + "\n" for line in lines))
    pushed.write_text("".join(json.dumps({"prompt": line["prompt"], "completion": " ".join(WARM) + ".", "label": True}) + "\n" for line in lines))
    disagreed.write_text("".join(json.dumps({**line, "chosen": line["rejected"], "rejected": line["chosen"]} if n % 2 else line) + "\n" for n, line in enumerate(lines)))
    jobs = [(str(folder / "long"), None, None, str(tmp_path / f"{file.stem}.json"), str(file)) for file in (same, pushed, disagreed)]
    said = run_ranks(rm_checks.audit, 1, jobs)[0]
    found = {name: json.loads((tmp_path / f"{name}.json").read_text())["policy"] for name in ("same", "pushed", "disagreed")}
    assert not found["same"]["shift"]["flagged"] and found["same"]["shift"]["shift"] == pytest.approx(0, abs=1e-5) and found["same"]["shift"]["samples"] == 80
    assert found["pushed"]["shift"]["flagged"] and found["pushed"]["shift"]["shift"] > 0.5 and "calibration" not in found["pushed"]
    assert said[1] == "AuditFailed: flagged: rewards of the policy's samples have moved"
    assert not found["disagreed"]["shift"]["flagged"] and found["disagreed"]["calibration"]["flagged"]
    assert said[2] == "AuditFailed: flagged: calibration on the policy's samples"
    assert found["same"]["calibration"]["samples"] == 40


def test_the_report_shows_heads_and_pairs(folder: Path):
    page = (folder / "long" / "report.html").read_text()
    pair = rows(folder / "long" / "samples.jsonl")[0]
    assert pair["chosen"]["text"] != pair["rejected"]["text"] and "Reward model" in page and "accuracy" in page
    assert all(text in page for text in ("Margin of the better answer", "Pairs ranked as judged"))
    page = (folder / "heads" / "report.html").read_text()
    assert "AUC" in page and "Spearman" in page

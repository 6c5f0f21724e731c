"""What a reward model learns from made signals: length, and whether users come back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import rm_checks
from ranks import run_ranks
from rm_checks import COLD, LONGER, WARM, metrics, recipe


def test_returns_are_learnt_on_other_users_and_later_days(tmp_path: Path):
    """R12: a user comes back sooner to warm answers; judged on users and days of which nothing was trained on, against the base rate."""
    from megalign.data.user_split import DAY, split_file

    numbers, end = np.random.default_rng(5), 60.0
    lines = []
    for number in range(1500):
        warm, day = int(numbers.integers(0, 7)), float(numbers.random() * end)
        gap = float(numbers.exponential(0.4 if warm > 3 else 9.0)) + 1e-3
        said = numbers.permutation([*numbers.choice(WARM, warm), *numbers.choice(COLD, 6 - warm)])
        told = {"time": min(gap, end - day), "observed": gap <= end - day}
        lines.append({"prompt": f"Say {number}", "completion": " ".join(said) + ".", "user": f"u{numbers.integers(0, 80)}", "time": day * DAY, "labels": {"gap": told}})
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    split = split_file(tmp_path / "log.jsonl", tmp_path / "split", share=0.3, horizon_days=7)
    heads = {"day": {"loss": "binary", "label": "gap", "within": 1.0}, "week": {"loss": "binary", "label": "gap", "within": 7.0}}
    data = {name: str(tmp_path / "split" / f"{name}.jsonl") for name in ("train", "validation")}
    run = recipe(tmp_path / "run", rm={"heads": heads}, train={**LONGER, "max_steps": 60}, data={**data, "max_rows": None, "max_bad_share": 0.1})
    assert run_ranks(rm_checks.train_all, 1, [run])[0] == [""]
    labels = json.loads((tmp_path / "run" / "data.json").read_text())
    assert labels["train"]["labels"] == {"day": len(split.train), "week": len(split.train)}, "the horizon leaves no label open"
    known = labels["validation"]["labels"]
    assert known["week"] < known["day"] < len(split.validation), "of the last days nobody knows yet"
    found = {name: entry["held_out"] for name, entry in json.loads((tmp_path / "run" / "rewards.json").read_text())["heads"].items()}
    for name in ("day", "week"):
        assert found[name]["rows"] == known[name] and found[name]["auc_interval"][0] > 0.6, found[name]
    assert found["day"]["auc"] > 0.8 and found["day"]["accuracy"] > found["day"]["base_rate"]


def test_shorter_is_better_is_learnt_and_the_audit_says_so(tmp_path: Path):
    """R4, R17: pairs of the same words in two lengths, the shorter preferred: high held-out accuracy, and length is flagged as punished."""
    numbers = np.random.default_rng(1)
    words = "fox owl river lamp stone bread cart tower garden bell".split()
    file = tmp_path / "shorter.jsonl"

    def answer(count: int) -> str:
        return " ".join(numbers.choice(words, count)) + "."

    file.write_text("".join(json.dumps({"prompt": f"Tell me {n}", "chosen": answer(int(numbers.integers(3, 9))), "rejected": answer(int(numbers.integers(14, 30)))}) + "\n" for n in range(320)))
    run = recipe(
        tmp_path / "shorter", data={"train": str(file), "max_rows": None, "validation_rows": 60, "sequence_length": 256}, logging={"report": True},
        train={"max_steps": 50, "global_batch_size": 8, "micro_batch_size": 8, "eval_interval": 10},
    )  # fmt: skip
    assert run_ranks(rm_checks.train_all, 1, [run])[0] == [""]
    found = json.loads((tmp_path / "shorter" / "rewards.json").read_text())["heads"]["reward"]["held_out"]
    assert found["accuracy"] > 0.95 and found["length_only_accuracy"] == 0
    assert metrics(tmp_path / "shorter")[-1]["rewards/length_correlation"] < 0
    (said,) = run_ranks(rm_checks.audit, 1, [(str(tmp_path / "shorter"), str(file), None, str(tmp_path / "audit.json"))])[0]
    assert said.startswith("AuditFailed: flagged: length")
    length = next(effect for effect in json.loads((tmp_path / "audit.json").read_text())["probes"] if effect["trait"] == "length")
    assert length["flagged"] and length["effect"] < -0.28
    assert "Loss" in (tmp_path / "shorter" / "report.html").read_text()


def test_ratings_classes_and_censored_times_are_learnt_and_measured(tmp_path: Path):
    """How many of six words are warm decides all three; held-out measures of whole runs, against the base rate and counted labels."""
    numbers, lines = np.random.default_rng(3), []
    for number in range(420):
        warm = int(numbers.integers(0, 7))
        gap, end = float(numbers.exponential(0.2 * 1.8**warm)), float(numbers.exponential(3.0))
        told = {"time": min(gap, end) + 1e-3, "observed": gap <= end}
        said = numbers.permutation([*numbers.choice(WARM, warm), *numbers.choice(COLD, 6 - warm)])
        lines.append({"prompt": f"Say {number}", "completion": " ".join(said) + ".", "labels": {"stars": warm, "kind": warm // 3, "gap": told}})
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    heads = {"stars": {"loss": "ordinal", "classes": 7}, "kind": {"loss": "classification", "classes": 3}, "gap": {"loss": "weibull", "weight": 0.5}}
    data = {"train": str(tmp_path / "log.jsonl"), "max_rows": None, "validation_rows": 140}
    run = recipe(tmp_path / "run", rm={"heads": heads}, train={**LONGER, "max_steps": 80}, data=data, logging={"report": True})
    assert run_ranks(rm_checks.train_all, 1, [run])[0] == [""]
    found = {name: entry["held_out"] for name, entry in json.loads((tmp_path / "run" / "rewards.json").read_text())["heads"].items()}
    held_out = [line["labels"] for line in lines[-140:]]
    assert found["stars"]["spearman_interval"][0] > 0.4, found["stars"]
    assert found["kind"]["base_rate"] == max(np.bincount([labels["kind"] for labels in held_out])) / 140 < found["kind"]["accuracy_interval"][0], found["kind"]
    assert found["gap"]["rows"] == 140 and found["gap"]["concordance_interval"][0] > 0.55, found["gap"]
    assert abs(found["gap"]["censored_share"] - np.mean([not labels["gap"]["observed"] for labels in held_out])) < 1e-9
    assert "Concordance" in (tmp_path / "run" / "report.html").read_text()


def test_retraining_with_old_labels_mixed_in_keeps_what_was_learnt(tmp_path: Path):
    """R23: new pairs teach other words, and happen to have cold ones in the better answer: alone they undo the old pairs, mixed with them they do not."""
    numbers = np.random.default_rng(2)
    good, bad = "red blue green gold".split(), "mud ash dust rust".split()

    def write(name: str, count: int, better: tuple[list[Any], ...], worse: tuple[list[Any], ...]) -> str:
        def answer(banks: tuple[list[Any], ...]) -> str:
            return " ".join(numbers.permutation([word for bank in banks for word in numbers.choice(bank, 6 // len(banks))])) + "."

        rows = ({"prompt": f"Say {n}", "chosen": answer(better), "rejected": answer(worse)} for n in range(count))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / f"{name}.jsonl")

    old, new = ((WARM,), (COLD,)), ((good, COLD), (bad, WARM))
    before, after = write("old", 200, *old), write("new", 200, *new)
    held = {"max_rows": None, "validation": [write("old-held", 60, *old), write("new-held", 60, *new)]}
    mixture = [{"name": "new", "path": after, "weight": 0.6}, {"name": "old", "path": before, "weight": 0.4, "kind": "replay"}]
    first = recipe(tmp_path / "first", train=LONGER, data={**held, "train": before})
    again = [recipe(tmp_path / name, train={**LONGER, "max_steps": 60}, data={**held, **data}) for name, data in (("alone", {"train": after}), ("mixed", {"mixture": mixture}))]
    assert run_ranks(rm_checks.train_all, 1, [first, *({**run, "model": {"init_from": str(tmp_path / "first")}} for run in again)])[0] == [""] * 3
    held_out = {name: json.loads((tmp_path / name / "rewards.json").read_text())["heads"]["reward"]["held_out"] for name in ("first", "alone", "mixed")}
    accuracy = {name: found["accuracy"] for name, found in held_out.items()}
    assert held_out["mixed"]["pairs"] == 120 and accuracy["mixed"] > 0.9, accuracy
    assert accuracy["first"] < 0.75 and accuracy["alone"] < 0.75, "each of one kind alone: half of the other kind is lost"

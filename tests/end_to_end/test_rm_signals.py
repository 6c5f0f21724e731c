"""What a reward model learns from made signals: length, and whether users come back."""

from __future__ import annotations

import json
from pathlib import Path

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

"""`best-of-n` and `rso` from a trained model to a better one: the verifier's score rises, a repeated command goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import best_of_n_checks
import pytest
from best_of_n_checks import metrics, recipe, start
from ranks import run_ranks

N, TP2 = 8, {"tensor_model_parallel_size": 2, "sequence_parallel": True}
VOWELS = f"{Path(best_of_n_checks.__file__).resolve()}:vowels"  # a count that even a hardly trained model can raise
ROUNDS = dict(n=N, prompts=32, max_new_tokens=32, scorer=VOWELS)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("best-of-n")
    begin = base / "start"

    def rounds(name: str, **settings: Any) -> dict[str, Any]:
        return recipe(base / name, begin, best_of_n={**ROUNDS, **settings}, train={"max_steps": 20}, logging={"report": name == "two"})

    jobs = [
        ("sft", start(begin)),
        ("best_of_n", rounds("two", rounds=2)),
        ("best_of_n", rounds("halves", rounds=1)),
        ("best_of_n", rounds("halves", rounds=2)),
        ("rso", recipe(base / "rso", begin, rso=dict(n=16, prompts=24, max_new_tokens=32, scorer=VOWELS, beta=2.0, accepted=6))),
        ("dpo", recipe(base / "dpo", begin, data=dict(train=str(base / "rso" / "pairs.jsonl"), sequence_length=384, validation_rows=4), train=dict(max_steps=2), optimizer=dict(lr_warmup_steps=0))),
    ]
    assert run_ranks(best_of_n_checks.work, 1, jobs)[0] == [""] * len(jobs)
    jobs = [("best_of_n", {**rounds("tp2", rounds=1), "parallel": TP2})]
    assert run_ranks(best_of_n_checks.work, 2, jobs)[0] == [""]
    return base


def test_the_verifiers_score_rises(folder: Path):
    before, between, after = metrics(folder / "two")
    assert [line["step"] for line in (before, between, after)] == [0, 1, 2]
    assert before["kl_bound"] == pytest.approx(1.2044, abs=1e-4), "ln 8 - 7/8"
    assert before["score/best_of_n"] > before["score/mean"] + 0.5
    assert between["score/mean"] > before["score/mean"] + 0.25, "after a round the policy itself answers better"
    assert after["score/held_out"] > before["score/held_out"]


def test_the_best_finished_answer_is_imitated(folder: Path):
    key, *drawn = lines(folder / "two" / "round_1" / "drawn.jsonl")
    chosen = lines(folder / "two" / "round_1" / "chosen.jsonl")
    assert len(drawn) == 32 and all(len(entry["answers"]) == len(entry["scores"]) == N for entry in drawn) and key["scorer"] == {"name": VOWELS}
    expected = []
    for entry in drawn:
        finished = [(score, -i) for i, (score, answer) in enumerate(zip(entry["scores"], entry["answers"])) if answer["finished"]]
        if finished:
            expected.append([*entry["prompt"], {"role": "assistant", "content": entry["answers"][-max(finished)[1]]["text"]}])
    assert [line["messages"] for line in chosen] == expected and len(expected) > 20
    assert len({answer["text"] for answer in drawn[0]["answers"]}) > 1, "independent draws"


def test_a_repeated_command_goes_on(folder: Path):
    """One round, then two in the same folder, are the two rounds at once: bitwise the same answers and losses."""
    for file in ("round_1/drawn.jsonl", "round_2/chosen.jsonl", "round_2/held_out_after.jsonl"):
        there, here = (lines(folder / name / file) for name in ("two", "halves"))
        assert [line for line in there if "model" not in line] == [line for line in here if "model" not in line]
    for part in ("round_1/run", "round_2/run"):
        assert best_of_n_checks.curve(folder / "two" / part, "loss", "grad_norm") == best_of_n_checks.curve(folder / "halves" / part, "loss", "grad_norm")
    assert [(line["step"], line.get("score/mean")) for line in metrics(folder / "two")] == [(line["step"], line.get("score/mean")) for line in metrics(folder / "halves")]


def test_every_layout_draws_the_same_answers(folder: Path):
    alone, cut = (lines(folder / name / "round_1" / "drawn.jsonl")[1:] for name in ("two", "tp2"))
    pairs = [(a["text"], b["text"]) for one, two in zip(alone, cut) for a, b in zip(one["answers"], two["answers"])]
    assert sum(a == b for a, b in pairs) > 0.97 * len(pairs), "up to rounding"
    assert metrics(folder / "tp2")[-1]["score/held_out"] > metrics(folder / "tp2")[0]["score/held_out"]


def test_the_report_shows_the_scores(folder: Path):
    page = (folder / "two" / "report.html").read_text()
    assert "Score of the scorer" in page and "best of n" in page
    assert (folder / "two" / "round_2" / "run" / "summary.json").exists()


def test_pairs_of_accepted_answers_train_dpo(folder: Path):
    pairs = lines(folder / "rso" / "pairs.jsonl")
    assert len(pairs) >= 8 and all(pair["score_chosen"] > pair["score_rejected"] == best_of_n_checks.vowels(None, pair["rejected"]) for pair in pairs)
    assert len(metrics(folder / "dpo")) == 2


def test_what_cannot_be_is_said(folder: Path, tmp_path: Path):
    begin = folder / "start"
    jobs = [
        ("best_of_n", recipe(folder / "two", begin, best_of_n={**ROUNDS, "temperature": 0.5})),
        ("best_of_n", recipe(tmp_path / "a", begin, best_of_n={**ROUNDS, "scorer": "no_such:thing"})),
        ("best_of_n", recipe(tmp_path / "b", begin, best_of_n={**ROUNDS, "min_score": 99.0})),
        ("rso", {**recipe(tmp_path / "c", begin), "model": {}}),
        ("rso", recipe(folder / "dpo", begin)),
    ]
    kept = (folder / "two" / "metrics.jsonl").read_bytes()
    other, scorer, none, untrained, stranger = run_ranks(best_of_n_checks.work, 1, jobs)[0]
    assert other.startswith("RunError") and "drawn with another sampling" in other
    assert (folder / "two" / "metrics.jsonl").read_bytes() == kept, "nothing of the run was touched"
    assert stranger.startswith("RunError") and "is not empty" in stranger
    assert scorer.startswith("ConfigError") and "best_of_n.scorer" in scorer
    assert none.startswith("DataError") and "min_score(99.0)" in none
    assert untrained.startswith("ConfigError") and "model.init_from" in untrained

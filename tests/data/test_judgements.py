"""Rows of reward models: which head learns from which row, what is left out and counted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megalign.config.schema import Recipe
from megalign.data.formats import detect, read_records
from megalign.data.judgements import JudgedRows, KeptRows, build_judgements
from megalign.data.rows import BadRow, DataError, PreferencePair, ScoredResponse

HEADS: dict[str, Any] = {
    "quality": {"loss": "bradley_terry"},
    "liked": {"loss": "bradley_terry"},
    "returns": {"loss": "binary", "label": "next_day"},
    "gap": {"loss": "weibull"},
}


def pair(number: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"Question {number}", "chosen": "Yes, gladly.", "rejected": "No.", **more}


def answer(number: int, **labels: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"Q {number}"}, {"role": "assistant", "content": "An answer"}], "labels": labels}


def build(tmp_path: Path, files: dict[str, list[dict[str, Any]]], heads: dict[str, Any] = HEADS, **data: Any) -> Any:
    for name, rows in files.items():
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    base = dict(train=[str(tmp_path / name) for name in files], validation_rows=0, sequence_length=256, tokenizer=dict(vocab_size=300), **data)
    return build_judgements(Recipe.model_validate({"output": str(tmp_path / "run"), "data": base, "rm": {"heads": heads}}))[0]


def test_a_row_teaches_the_heads_whose_labels_it_knows(tmp_path: Path):
    pairs = [pair(0), pair(1, labels={"quality": 1, "liked": -2}, margin=0.5), pair(2, labels={"liked": 1})]
    answers = [answer(3, next_day=True), answer(4, gap={"time": 2.5, "observed": False}, next_day=False), answer(5, gap={"time": 4}, other=3)]
    train = build(tmp_path, {"pairs.jsonl": pairs, "answers.jsonl": answers})
    rows = train.rows
    assert isinstance(rows, JudgedRows) and [len(row) for row in rows] == [2, 2, 2, 1, 1, 1]

    def column(name: str) -> list[list[float | None]]:
        return [[None if math.isnan(value := example.values[name]) else value for example in row] for row in rows]

    assert column("quality") == [[1, 1], [1, 1], [None, None], [None], [None], [None]]
    assert column("liked") == [[1, 1], [-1, -1], [1, 1], [None], [None], [None]]
    assert column("returns") == [[None, None]] * 3 + [[1], [0], [None]]
    assert column("gap") == [[None, None]] * 3 + [[None], [2.5], [4]]
    assert column("gap.observed")[4:] == [[0], [1]]
    assert column("side") == [[1, -1]] * 3 + [[0]] * 3 and column("margin")[1] == [0.5, 0.5]
    assert column("row") == [[n] * len(row) for n, row in enumerate(rows)]
    assert train.statistics["labels"] == {"quality": 2, "liked": 3, "returns": 2, "gap": 2}
    assert "An answer<|im_end|>" in train.tokenizer.decode(rows[3][0].input_ids)
    assert isinstance(train.kept, KeptRows)
    assert [type(row) for row in train.kept.judgements()] == [PreferencePair] * 3 + [ScoredResponse] * 3
    assert [row.messages[-1].content for row in train.kept][2:4] == ["Yes, gladly.", "An answer"]


def test_what_teaches_nothing_or_does_not_fit_is_counted(tmp_path: Path):
    long = " ".join(map(str, range(300)))
    pairs = [pair(0), pair(1, chosen=long), pair(2, labels={"style": 1}), {"prompt": "a", "chosen": "b", "rejected": "b"}]
    answers = [answer(3, next_day=2), answer(4, gap={"time": 0}), answer(5, next_day=True), answer(6, gap={"time": 3}), answer(7, stars=3)]
    train = build(tmp_path, {"pairs.jsonl": pairs, "answers.jsonl": answers}, max_bad_share=0.9)
    counts = train.statistics
    assert (counts["rows_read"], counts["rows_kept"], counts["bad"], counts["truncated_away"]) == (9, 3, 5, 1)
    reasons = [f"{Path(row['source']).name}:{row['line']}: {row['reason']}" for row in counts["rejected"]]
    for part in (
        "pairs.jsonl:2: ", "pairs.jsonl:3: no head of rm.heads", "its labels are style", "pairs.jsonl:4: tie",
        "answers.jsonl:1: label 'next_day' is 2: head returns is binary, which takes true and false", "answers.jsonl:2: label 'gap' is 0: head gap is weibull, which takes times above 0",
        "answers.jsonl:5: no head of rm.heads (quality: bradley_terry, liked: bradley_terry, returns: binary, gap: weibull) learns from this row: its labels are stars",
    ):  # fmt: skip
        assert any(part in reason for reason in reasons), (part, reasons)


def test_other_heads_are_other_tokens_of_the_cache(tmp_path: Path):
    """The cache keeps what heads take of a row: a run with other heads reads it anew."""
    answers = {"answers.jsonl": [answer(n, stars=n % 3, next_day=n % 2 == 0) for n in range(6)]}
    stars = build(tmp_path, answers, {"stars": {"loss": "ordinal", "classes": 3}})
    returns = build(tmp_path, answers, {"stars": {"loss": "binary", "label": "next_day"}})
    assert [row[0].values["stars"] for row in stars.rows] == [0, 1, 2, 0, 1, 2]
    assert [row[0].values["stars"] for row in returns.rows] == [1, 0, 1, 0, 1, 0]
    assert stars.statistics["fingerprint"] != returns.statistics["fingerprint"]


def test_formats_with_labels(tmp_path: Path):
    file = tmp_path / "a.jsonl"
    bad = {**answer(1), "labels": {"gap": {"observed": True}}}
    file.write_text("\n".join(map(json.dumps, [answer(0, turns=3, returns=None), bad, {**answer(2), "labels": {"x": "much"}}, answer(3)])))
    assert detect(file) == "labelled"
    good, *others = read_records(file)
    assert isinstance(good, ScoredResponse) and good.scores == (("turns", 3.0),)
    assert [row.reason for row in others if isinstance(row, BadRow)] == ["labels.gap has no 'time'", "labels.x is 'much', neither a number nor true or false", "'labels' names nothing"]
    kto = build(tmp_path, {"kto.jsonl": [{"prompt": "a", "completion": "b", "label": n % 2 == 0} for n in range(4)]}, {"label": {"loss": "binary"}}, max_bad_share=0.5)
    assert [row[0].values["label"] for row in kto.rows] == [1, 0, 1, 0]


def test_a_head_that_nothing_teaches_is_an_error(tmp_path: Path):
    with pytest.raises(DataError, match=r"no row with a label 'next_day' for head 'returns' \(rm.heads.returns.loss=binary\)"):
        build(tmp_path, {"pairs.jsonl": [pair(n) for n in range(3)]}, {"quality": {}, "returns": HEADS["returns"]})
    with pytest.raises(DataError, match="no pair for head 'quality'"):
        build(tmp_path, {"answers.jsonl": [answer(n, next_day=True) for n in range(3)]}, {"quality": {}, "returns": HEADS["returns"]})

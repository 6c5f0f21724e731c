"""Labelled answers as training rows, and the answers to other prompts from which KTO estimates its baseline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalign.config.schema import Recipe
from megalign.data import grammar
from megalign.data.answers import Wanted, as_answers, build_answers
from megalign.data.mismatched import mismatched, partners
from megalign.data.rows import (
    BadRow,
    Conversation,
    DataError,
    LabelledResponse,
    Message,
    PreferencePair,
    Response,
)


def row(number: int, answer: str = "", label: bool | None = None) -> dict[str, Any]:
    said = [("user", f"Question {number}"), ("assistant", "An earlier answer"), ("user", "And now?")]
    prompt = [{"role": role, "content": text} for role, text in said]
    return {"prompt": prompt, "completion": answer or f"Answer {number}.", "label": number % 3 == 0 if label is None else label}


def recipe(tmp_path: Path, rows: list[dict[str, Any]], batch: int = 4, **data: Any) -> Recipe:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    base = dict(train=str(tmp_path / "rows.jsonl"), validation_rows=2, sequence_length=128, tokenizer=dict(vocab_size=300))
    train = dict(micro_batch_size=1, global_batch_size=batch)
    return Recipe.model_validate({"output": str(tmp_path / "run"), "data": {**base, **data}, "train": train})


def test_the_answer_alone_is_scored_and_carries_its_label(tmp_path: Path):
    train, validation = build_answers(recipe(tmp_path, [row(n) for n in range(11)]))
    assert (len(train), len(validation)) == (9, 2) and train.statistics["desirable"] == 3
    (example,) = train.rows[4]
    decode = train.tokenizer.decode
    assert decode(example.input_ids[example.loss_mask]) == "Answer 4.<|im_end|>"
    assert example.values == {"weight": 1.0, "row": 4.0, "desirable": 0.0, "held_out": 0.0}
    (other,) = validation.rows[0]
    assert other.values == {"weight": 1.0, "row": 0.0, "desirable": 1.0, "held_out": 1.0} and "Question 9" in decode(other.input_ids)
    assert train.tokens[4] == len(example)
    assert isinstance(train.kept, Wanted)
    assert [said.messages[-1].content for said in train.kept] == [f"Answer {n}." for n in (0, 3, 6)]
    assert [said.label for said in train.kept.judged()][:4] == [True, False, False, True]


def test_a_mismatched_answer_is_that_of_the_row_before_in_its_block(tmp_path: Path):
    r = recipe(tmp_path, [row(n) for n in range(11)])
    train, _ = build_answers(r)
    other = mismatched(train, r)
    decode = train.tokenizer.decode
    found = []
    for number in range(len(other)):
        (example,) = other.rows[number]
        (own,) = train.rows[number]
        start = int(np.argmax(own.loss_mask))
        assert (example.input_ids[:start] == own.input_ids[:start]).all() and not example.loss_mask[:start].any()
        assert example.values == own.values and other.tokens[number] == len(example)
        found.append(int(decode(example.input_ids[example.loss_mask]).removeprefix("Answer ").removesuffix(".<|im_end|>")))
    assert found == [3, 0, 1, 2, 8, 4, 5, 6, 7], "blocks of 4 and of 5: a single last row joins"
    assert other.statistics["fingerprint"] != train.statistics["fingerprint"]
    assert mismatched(train, recipe(tmp_path, [row(n) for n in range(11)], batch=3)).statistics["fingerprint"] != other.statistics["fingerprint"]


def test_partners_are_permutations_of_blocks_that_avoid_the_own_prompt():
    assert partners(np.arange(8), 4).tolist() == [3, 0, 1, 2, 7, 4, 5, 6]
    sides = np.repeat(np.arange(4), 2)  # two answers to each prompt, one after the other
    found = partners(sides, 8)
    assert sorted(found.tolist()) == list(range(8)) and (sides[found] != sides).all()
    assert sorted(partners(np.array([0, 0, 0, 1]), 4).tolist()) == [0, 1, 2, 3]
    assert partners(np.arange(0), 4).tolist() == [] and partners(np.arange(1), 4).tolist() == [0]
    with pytest.raises(DataError, match="give 2 or more"):
        partners(np.arange(8), 1)


def test_a_mismatched_answer_is_cut_to_fit_and_an_answer_never(tmp_path: Path):
    rows = [row(0), row(1, " ".join(map(str, range(20, 41)))), row(2), row(3, str([*range(200)]))]
    long = {**row(4), "prompt": " ".join(map(str, range(40, 58)))}
    r = recipe(tmp_path, [*rows, long], validation_rows=0, batch=2)
    train, _ = build_answers(r)
    counts = train.statistics
    assert counts["rows_kept"] == len(train) == 4 and counts["truncated_away"] == 1 and "tokens" in counts["rejected"][0]["reason"]
    other = mismatched(train, r)
    assert max(other.tokens) <= 128 and all(example.loss_mask.any() for (example,) in other.rows)


def test_pairs_become_two_answers_and_what_has_no_label_is_bad():
    question, good, bad = (Message("user", "?"),), Response((Message("assistant", "a"),)), Response((Message("assistant", "b"),))
    first, second = as_answers(PreferencePair(question, good, bad, 0.5))
    assert isinstance(first, LabelledResponse) and isinstance(second, LabelledResponse)
    assert (first.label, first.response, second.label, second.response, first.weight) == (True, good, False, bad, 0.5)
    (found,) = as_answers(Conversation((*question, Message("assistant", "!"))))
    assert isinstance(found, BadRow) and "no label" in found.reason
    for line in grammar.generate(20, 3):
        (answer,) = as_answers(line)
        assert isinstance(answer, LabelledResponse) and answer.label == (answer.response.text == line.messages[-1].content)


@pytest.mark.parametrize("change, words", [({"loss_on": "all"}, "prompts would be in the sum"), ({"streaming": True}, "read as a whole")])
def test_what_would_spoil_answers_is_refused(tmp_path: Path, change: dict[str, Any], words: str):
    with pytest.raises(DataError, match=words):
        build_answers(recipe(tmp_path, [row(0), row(1)], **change))

"""Pairs of answers as training rows: what is scored, what is shared, what is left out and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalign.config.schema import Recipe
from megalign.data import grammar
from megalign.data.pairs import KeptPairs, PairRows, as_pairs, build_pairs, sides
from megalign.data.rows import (
    BadRow,
    Conversation,
    DataError,
    Message,
    PreferencePair,
    RankedResponses,
    Response,
)


def pair(number: int, chosen: str = "Yes, gladly.", rejected: str = "No.") -> dict[str, Any]:
    said = [("user", f"Question {number}"), ("assistant", "An earlier answer"), ("user", "And now?")]
    return {"prompt": [{"role": role, "content": text} for role, text in said], "chosen": chosen, "rejected": rejected}


def recipe(tmp_path: Path, rows: list[dict[str, Any]], **data: Any) -> Recipe:
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    base = dict(train=str(tmp_path / "pairs.jsonl"), validation_rows=2, sequence_length=256, tokenizer=dict(vocab_size=300))
    return Recipe.model_validate({"output": str(tmp_path / "run"), "data": {**base, **data}})


def test_the_answer_alone_is_scored_and_the_prompt_is_shared(tmp_path: Path):
    train, validation = build_pairs(recipe(tmp_path, [pair(n) for n in range(10)]))
    assert (len(train), len(validation)) == (8, 2)
    chosen, rejected = train.rows[3]
    decode = train.tokenizer.decode
    assert decode(chosen.input_ids[chosen.loss_mask]) == "Yes, gladly.<|im_end|>"
    assert decode(rejected.input_ids[rejected.loss_mask]) == "No.<|im_end|>"
    prompt = int(np.flatnonzero(chosen.loss_mask)[0])
    assert (chosen.input_ids[:prompt] == rejected.input_ids[:prompt]).all() and not rejected.loss_mask[:prompt].any()
    assert "An earlier answer" in decode(chosen.input_ids[:prompt])
    assert chosen.values == rejected.values == {"weight": 1.0, "row": 3.0}
    assert train.tokens[3] == len(chosen) + len(rejected)
    assert isinstance(train.kept, KeptPairs)
    assert [row.messages[-1].content for row in list(train.kept)[:2]] == ["Yes, gladly."] * 2
    assert isinstance(validation.rows, PairRows) and "Question 9" in decode(validation.rows[1][0].input_ids)


def test_what_does_not_fit_or_is_no_pair_is_left_out_and_counted(tmp_path: Path):
    rows = [pair(0), pair(1, chosen=str([*range(200)])), {"prompt": "a", "chosen": "b", "rejected": "b"}, pair(2, str([*range(40)]), str([*range(300, 340)])), *(pair(n) for n in range(3, 9))]
    train, _ = build_pairs(recipe(tmp_path, rows, max_bad_share=0.2))
    counts = train.statistics
    assert counts["rows_read"] == 8 and counts["rows_kept"] == len(train) == 5 and counts["bad"] == 1 and counts["truncated_away"] == 2
    reasons = {row["line"]: row["reason"] for row in counts["rejected"]}
    assert "tie" in reasons[3] and "both sides together" in reasons[4] and "tokens" in reasons[2]
    with pytest.raises(DataError, match="1 of 10 rows are unusable"):
        build_pairs(recipe(tmp_path, rows))


def test_rankings_become_pairs_whose_weights_sum_to_one(tmp_path: Path):
    answers = tuple(Response((Message("assistant", text),), rank=rank) for text, rank in (("a", 1.0), ("b", 2.0), ("c", 2.0)))
    found = as_pairs(RankedResponses((Message("user", "?"),), answers))
    assert [row.weight for row in found if isinstance(row, PreferencePair)] == [0.5, 0.5]
    ranked = {"context": "?", "completions": [{"rank": rank, "completion": text} for rank, text in ((1, "one"), (2, "two"), (2, "three"))]}
    train, _ = build_pairs(recipe(tmp_path, [ranked, ranked], validation_rows=0))
    assert [pair[0].values["weight"] for pair in train.rows] == [0.5] * 4 == [pair[1].values["weight"] for pair in train.rows]
    (bad,) = as_pairs(Conversation((Message("user", "?"), Message("assistant", "!"))))
    assert isinstance(bad, BadRow) and "dpo learns from pairs" in bad.reason


def test_an_answer_of_several_turns_is_scored_in_its_own_turns_alone():
    turns = (Message("assistant", "one"), Message("user", "go on"), Message("assistant", "two"))
    row = PreferencePair((Message("user", "?"), Message("assistant", "before"), Message("user", "!")), Response(turns), Response(turns[:1]))
    chosen, _ = sides(row)
    assert [message.scored for message in chosen.messages if message.role == "assistant"] == [False, True, True]


def test_the_grammar_has_pairs_of_a_right_and_a_wrong_answer():
    for row in grammar.generate(50, 3):
        (found,) = as_pairs(row)
        assert isinstance(found, PreferencePair)
        right, wrong = found.chosen.text, found.rejected.text
        assert right == row.messages[-1].content != wrong and len(right.split()) - 2 <= len(wrong.split()) <= len(right.split()) + 3


def test_a_mixture_of_pairs_keeps_its_parts(tmp_path: Path):
    for name, count in (("a", 5), ("b", 3)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(pair(n)) for n in range(count)))
    mixture = [{"name": name, "path": str(tmp_path / f"{name}.jsonl"), "weight": weight} for name, weight in (("a", 3), ("b", 1))]
    data = dict(mixture=mixture, validation_rows=0, sequence_length=256, tokenizer=dict(vocab_size=300))
    train, _ = build_pairs(Recipe.model_validate({"output": str(tmp_path / "run"), "data": data}))
    assert [(part.name, part.weight, part.start, part.stop) for part in train.parts] == [("a", 0.75, 0, 5), ("b", 0.25, 5, 8)]
    assert [int(pair[0].values["row"]) for pair in train.rows] == list(range(8))


@pytest.mark.parametrize("change, words", [({"loss_on": "all"}, "prompts would be in the sum"), ({"streaming": True}, "read as a whole")])
def test_what_would_spoil_pairs_is_refused(tmp_path: Path, change: dict[str, Any], words: str):
    with pytest.raises(DataError, match=words):
        build_pairs(recipe(tmp_path, [pair(0)], **change))


def test_real_pairs(shared_data: Path, tmp_path: Path):
    """hh_harmless: every row is kept, too long or bad (so is one of the two that validate); the sides share their prompt."""
    r = recipe(tmp_path, [pair(0)], train=str(shared_data / "hh_harmless" / "pairs.jsonl.gz"), max_rows=200, sequence_length=1024, max_bad_share=0.2)
    train, validation = build_pairs(r)
    counts = train.statistics
    assert counts["rows_read"] == counts["rows_kept"] + counts["bad"] + counts["truncated_away"] and len(train) > 100 and len(validation) == 1
    for chosen, rejected in train.rows:
        start = min(int(np.flatnonzero(side.loss_mask)[0]) for side in (chosen, rejected))
        assert (chosen.input_ids[:start] == rejected.input_ids[:start]).all()
        assert len(chosen) + len(rejected) <= 1024

"""`megalign data preview|stats|tokenizer` on files: the format announced, rows accounted for, bytes per token."""

from __future__ import annotations

import json
import re

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from megalign.cli import app
from megalign.data.rows import DataError
from megalign.data.statistics import HELD_OUT
from megalign.data.tokenizer import load_tokenizer

PAIR = {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"}
TEXTS = [f"The fox number {n} lives at harbour {n * 7 % 13}; é {'ha' * (n % 5)}." for n in range(1, 101)]


def call(*arguments):
    done = CliRunner().invoke(app, ["data", *map(str, arguments)], catch_exceptions=True)
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return re.sub(r"\s+", " ", done.output), done.exit_code


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, [PAIR, {**PAIR, "rejected": "Hello"}, {**PAIR, "rejected": None}, {**PAIR, "chosen": "Hello"}])))
    return path


def test_stats_account_for_every_row(pairs):
    output, _ = call("stats", pairs)
    assert "pairs.jsonl: format preference, of which supervised training takes the chosen side" in output
    assert "4 rows: 2 PreferencePair, 2 unusable; 2 for supervised training" in output
    assert "1 x tie: both sides are the same (first at 2)" in output and "1 x 'rejected' is missing (first at 3)" in output
    with pytest.raises(DataError, match="nowhere.jsonl: does not exist, or is no data file"):
        call("stats", "nowhere.jsonl")


def test_preview_of_a_file_with_a_format_and_a_template(pairs):
    output, _ = call("preview", pairs, "data.template=vicuna", "data.tokenizer.vocab_size=300")
    assert "format preference, of which supervised training takes the chosen side; template vicuna" in output
    assert "USER: Hi ASSISTANT:« Hello</s>»" in output
    assert "pairs.jsonl:2: not used: tie: both sides are the same" in output
    path = pairs.with_name("both.jsonl")
    path.write_text(json.dumps({"text": "As it is.", **PAIR}))
    output, _ = call("preview", path, "--format", "text", "data.tokenizer.vocab_size=300")
    assert "format text;" in output and "As« it is.<|endoftext|>»" in output


def test_preview_of_a_data_file_that_is_not_there_does_not_ask_for_a_recipe():
    with pytest.raises(DataError, match="data file 'nowhere.jsonl.gz' does not exist"):
        call("preview", "nowhere.jsonl.gz")


def test_a_tokenizer_is_trained_and_measured_on_text_it_has_not_seen(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("\n\n".join(TEXTS), encoding="utf-8")
    output, _ = call("tokenizer", file, "--vocab-size", 320, "--output", tmp_path / "t", "--special-token", "<think>", "--template", "llama3")
    oracle = AutoTokenizer.from_pretrained(tmp_path / "t")
    assert len(oracle) <= 320
    assert "a.txt: format text" in output and f"{tmp_path / 't'}: {len(oracle)} tokens, template llama3" in output
    for name, texts in (
        ("trained on", [t for n, t in enumerate(TEXTS, 1) if n % HELD_OUT]),
        ("held out (every 20th text)", TEXTS[HELD_OUT - 1 :: HELD_OUT]),
    ):
        size = sum(len(text.encode()) for text in texts)
        count = sum(len(ids) for ids in oracle(texts, add_special_tokens=False)["input_ids"])
        assert f"{name}: {size:,} bytes, {count:,} tokens, {size / count:.2f} bytes per token" in output
    assert "nothing was held out" not in output
    (tmp_path / "one.txt").write_text("One text alone.")
    assert "nothing was held out: the files hold fewer than 20 texts" in call("tokenizer", tmp_path / "one.txt", "--output", tmp_path / "one")[0]
    loaded = load_tokenizer(tmp_path / "t")
    assert loaded.template.name == "llama3" and len(loaded.encode("<think>")) == 1
    with pytest.raises(DataError, match="exists and is not empty; choose another folder"):
        call("tokenizer", file, "--output", tmp_path / "t")
    (tmp_path / "b.jsonl").write_text('{"text": ""}')
    with pytest.raises(DataError, match="no usable row, so there is no text to train on"):
        call("tokenizer", tmp_path / "b.jsonl", "--output", tmp_path / "u")
    assert not (tmp_path / "u").exists()

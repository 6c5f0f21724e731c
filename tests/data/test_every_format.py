"""Every format that users bring, each in every kind of file: detected, and read as the same typed row."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megalign.data.formats import detect, read_records
from megalign.data.rows import (
    AnyRow,
    Conversation,
    LabelledResponse,
    Message,
    PreferencePair,
    RankedResponses,
    Response,
    ScoredResponse,
    VerifiableProblem,
)

SYSTEM, USER, GOOD, BAD = Message("system", "Be kind."), Message("user", "Hi"), Message("assistant", "Hello"), Message("assistant", "No")
S, U, G, B = ({"role": m.role, "content": m.content} for m in (SYSTEM, USER, GOOD, BAD))
FIRST, REPLY = Message("user", "Who?"), Message("assistant", "I.")
HH = "\n\nHuman: Hi\n\nAssistant: "
STAMP: dict[str, Any] = {"line": 1}

# name of the format, a row as its users publish it, what it means
TABLE: dict[str, tuple[str, dict[str, Any], AnyRow]] = {
    "OpenAI messages": ("messages", {"messages": [S, U, G]}, Conversation((SYSTEM, USER, GOOD), **STAMP)),
    "prompt and completion, texts": ("prompt_completion", {"prompt": "Hi", "completion": "Hello"}, Conversation((USER, GOOD), **STAMP)),
    "prompt and completion, messages": ("prompt_completion", {"prompt": [S, U], "completion": [G]}, Conversation((SYSTEM, USER, GOOD), **STAMP)),
    "preference, prompt in its own key": (
        "preference", {"prompt": "Hi", "chosen": "Hello", "rejected": "No"}, PreferencePair((USER,), Response((GOOD,)), Response((BAD,)), **STAMP),
    ),
    "preference, prompt in its own key, messages": (
        "preference", {"prompt": [S, U], "chosen": [G], "rejected": [B]}, PreferencePair((SYSTEM, USER), Response((GOOD,)), Response((BAD,)), **STAMP),
    ),
    "preference, prompt inside both sides": (
        "preference", {"chosen": [S, U, G], "rejected": [S, U, B]}, PreferencePair((SYSTEM, USER), Response((GOOD,)), Response((BAD,)), **STAMP),
    ),
    "ranked completions": (
        "ranked", {"context": "Hi", "completions": [{"rank": 2, "completion": "No"}, {"rank": 1, "completion": "Hello"}]},
        RankedResponses((USER,), (Response((GOOD,), rank=1.0), Response((BAD,), rank=2.0)), **STAMP),
    ),
    "KTO": ("unpaired", {"prompt": "Hi", "completion": "No", "label": False}, LabelledResponse((USER,), Response((BAD,)), False, **STAMP)),
    "messages and label": ("unpaired", {"messages": [U, G], "label": True}, LabelledResponse((USER,), Response((GOOD,)), True, **STAMP)),
    "ShareGPT": (
        "sharegpt", {"system": "Be kind.", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        Conversation((SYSTEM, USER, GOOD), **STAMP),
    ),
    "ShareGPT with its system turn": (
        "sharegpt", {"conversations": [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        Conversation((SYSTEM, USER, GOOD), **STAMP),
    ),
    "Alpaca": ("instruction", {"instruction": "Hi", "input": "", "output": "Hello"}, Conversation((USER, GOOD), **STAMP)),
    "Alpaca with system and history": (
        "instruction", {"instruction": "Hi", "input": "", "output": "Hello", "system": "Be kind.", "history": [["Who?", "I."]]},
        Conversation((SYSTEM, FIRST, REPLY, USER, GOOD), **STAMP),
    ),
    "instruction, input and response": (
        "instruction", {"instruction": "Add.", "input": "1 2", "response": "3"},
        Conversation((Message("user", "Add.\n\n1 2", input="1 2"), Message("assistant", "3")), **STAMP),
    ),
    "HH transcripts": ("hh", {"chosen": HH + "Hello", "rejected": HH + "No"}, PreferencePair((USER,), Response((GOOD,)), Response((BAD,)), **STAMP)),
    "UltraFeedback": (
        "ultrafeedback",
        {"instruction": "Hi", "completions": [{"response": "No", "overall_score": 2.0, "model": "b"}, {"response": "Hello", "overall_score": 8.5, "model": "a"}]},
        RankedResponses((USER,), (Response((GOOD,), score=8.5, policy="a"), Response((BAD,), score=2.0, policy="b")), **STAMP),
    ),
    "HelpSteer": (
        "helpsteer", {"prompt": "Hi", "response": "Hello", "helpfulness": 4, "correctness": 3, "coherence": 4, "complexity": 1, "verbosity": 0},
        ScoredResponse(
            (USER,), Response((GOOD,)), (("helpfulness", 4.0), ("correctness", 3.0), ("coherence", 4.0), ("complexity", 1.0), ("verbosity", 0.0)), **STAMP
        ),
    ),
    "HelpSteer, two responses": (
        "helpsteer", {"prompt": "Hi", "response_1": "No", "response_2": "Hello", "preference_strength": 2},
        PreferencePair((USER,), Response((GOOD,)), Response((BAD,)), margin=2.0, **STAMP),
    ),
    "GSM8K": (
        "gsm8k", {"question": "Hi", "answer": "70 + 2\n#### 72"}, VerifiableProblem((USER,), "72", "70 + 2\n#### 72", **STAMP),
    ),
    "ShareGPT turns, sides as objects": (
        "preference",
        {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "Hello"}, "rejected": {"from": "gpt", "value": "No"}},
        PreferencePair((USER,), Response((GOOD,)), Response((BAD,)), **STAMP),
    ),
    "two outputs and a preference": (
        "comparison", {"instruction": "Hi", "output_1": "No", "output_2": "Hello", "preference": 2},
        PreferencePair((USER,), Response((GOOD,)), Response((BAD,)), margin=1.0, **STAMP),
    ),
}  # fmt: skip


def written(folder: Path, value: dict[str, Any]) -> list[Path]:
    """The row in every kind of file."""
    line, table = json.dumps(value), pyarrow.Table.from_pylist([value])
    paths = [folder / name for name in ("a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz", "a.parquet", "a.arrow")]
    paths[0].write_text(line)
    paths[1].write_text(f"[{line}]")
    paths[2].write_bytes(gzip.compress(line.encode()))
    paths[3].write_bytes(gzip.compress(f"[{line}]".encode()))
    pyarrow.parquet.write_table(table, paths[4])
    saved = folder / "saved"  # by `datasets`
    saved.mkdir()
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    for path in (paths[5], saved / "data-00000-of-00001.arrow"):
        with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return [*paths, saved]


@pytest.mark.parametrize("name", TABLE)
def test_the_row_is_what_it_means_in_every_kind_of_file(name: str, tmp_path: Path):
    format, value, wanted = TABLE[name]
    for path in written(tmp_path, value):
        assert detect(path) == format, path
        (row,) = read_records(path)
        assert vars(row) == {**vars(wanted), "source": str(path)}, path
        if isinstance(row, Conversation) and isinstance(wanted, Conversation):
            assert [message.input for message in row.messages] == [message.input for message in wanted.messages]

"""The preview shows the tokens that are trained on, with their mask, and what was left out."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from megalign.config.schema import Recipe
from megalign.data.encode import encode
from megalign.data.preview import coloured, preview
from megalign.data.rows import Conversation, Example, Message


@pytest.fixture
def shown(tmp_path):
    turns = [("user", "Hi [bold]you[/bold] \x1b[2J"), ("assistant", "Größe 🙂")]
    row = json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]})
    path = tmp_path / "a.jsonl"
    path.write_text(f"{row}\n{{\n{row}\n{row}", encoding="utf-8")
    data = {"train": str(path), "validation_rows": 0, "max_bad_share": 0.5, "tokenizer": {"vocab_size": 300}}

    def run(count, **console):
        out = io.StringIO()
        preview(Recipe.model_validate({"data": data}), count, Console(file=out, width=300, **console))
        return out.getvalue()

    return run


def test_mask_is_visible_without_colour(shown):
    text = shown(2)
    row = (
        "<|im_start|>user\nHi [bold]you[/bold] ␛[2J<|im_end|>\n<|im_start|>assistant\n«Größe 🙂<|im_end|>»\n"
    )
    assert text.count(row) == 2  # markup of the data is text, and its escape codes steer no terminal
    assert "\x1b" not in text
    assert "a.jsonl: format messages; template chatml, loss on assistant" in text
    assert "a.jsonl:2: not used: not JSON" in text
    assert "a.jsonl:3: " in text and "a.jsonl:4: " not in text
    assert "a.jsonl:2:" not in shown(1)


def test_scored_tokens_are_green(shown):
    text = shown(1, force_terminal=True, color_system="standard")
    assert "\x1b[1;32m«Größe 🙂<|im_end|>»\x1b[0m" in text


def test_coloured_is_the_decoded_example(tokenizer):
    row = Conversation((Message("user", "Hi"), Message("assistant", "日本語")))
    example = encode(row, tokenizer)
    assert isinstance(example, Example)
    assert (
        coloured(example, tokenizer).plain
        == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«日本語<|im_end|>»\n"
    )

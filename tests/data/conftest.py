"""A small tokenizer of our own, and conversations to try it on."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from megalign.data.rows import Conversation, Message
from megalign.data.tokenizer import Tokenizer, train_tokenizer

settings.register_profile("busy machine", deadline=None, max_examples=50)  # tests share two cores
settings.load_profile("busy machine")

WORDS = """You are a helpful assistant. What is 2+2? 2+2 equals 4. And 3+3? 3+3 equals 6.
user system assistant The fox lives at the harbour, and the owl in the forest; they're friends. Größe, naïve, 日本語, 🙂.
<|im_start|>user <|im_end|> <|endoftext|> is what an attacker writes. <|im_end|> <|im_end|> <|im_end|>"""


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The cache of a recipe without an output lies under the working folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer([WORDS] * 5, vocab_size=350)


@pytest.fixture(scope="session")
def sums() -> Conversation:
    """The conversation of spec/templates.md."""
    turns = [
        ("system", "You are a helpful assistant."),
        ("user", "What is 2+2?"),
        ("assistant", "2+2 equals 4."),
        ("user", "And 3+3?"),
        ("assistant", "3+3 equals 6."),
    ]
    return Conversation(tuple(Message(*turn) for turn in turns), source="sums", line=7)

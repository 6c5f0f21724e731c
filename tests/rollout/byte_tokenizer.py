"""A tokenizer of which every token is one byte: the worst case for printing text as it comes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

from megalign.data.templates import CHATML

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


class ByteTokenizer:
    vocab_size, eod, end_of_turn = 259, 256, 258
    control_tokens, prefix_after_control = tuple(CONTROL), False
    hf = SimpleNamespace(chat_template=CHATML.jinja, special_tokens_map={})

    def encode(self, text: str, continued: bool = False) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str], continued: bool = False) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        pieces = (bytes([i]) if i < 256 else CONTROL[i - 256].encode() for i in ids)
        return b"".join(pieces).decode(errors="replace")

    def token_id(self, token: str) -> int:
        return 256 + CONTROL.index(token)


def byte_tokenizer() -> Any:
    return ByteTokenizer()

"""A tokenizer of which every token is one byte: the worst case for printing text as it comes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


class ByteTokenizer:
    vocab_size, eod, end_of_turn = 259, 256, 258

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        pieces = (bytes([i]) if i < 256 else CONTROL[i - 256].encode() for i in ids)
        return b"".join(pieces).decode(errors="replace")

    def token_id(self, token: str) -> int:
        return 256 + CONTROL.index(token)


def byte_tokenizer() -> Any:
    return ByteTokenizer()

"""Text of tokens as they come. A byte-level token may hold half a character, not to be printed yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence

BROKEN = "\ufffd"  # what decoding leaves of an incomplete (or wrong) UTF-8 sequence


class TextStream:
    """`push` tokens, print what it returns; `flush` gives what was still held back.

    All pieces joined equal `decode(all ids)`. Decodes the whole answer each time: pieces decoded alone would
    lose the spaces that some tokenizers put between tokens.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self.decode = decode
        self.ids: list[int] = []
        self.given = 0  # characters

    def push(self, token: int) -> str:
        """The new text up to the last complete character."""
        self.ids.append(token)
        return self._give(self.decode(self.ids).rstrip(BROKEN))

    def flush(self) -> str:
        """The rest, broken characters and all."""
        return self._give(self.decode(self.ids))

    def _give(self, text: str) -> str:
        piece = text[self.given :]
        self.given = max(self.given, len(text))
        return piece

"""Streamed pieces never end in half a character, and together they are the text."""

from __future__ import annotations

from byte_tokenizer import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from megalign.rollout.stream import BROKEN, TextStream


def test_characters_come_whole():
    stream = TextStream(byte_tokenizer().decode)
    pieces = [stream.push(byte) for byte in "aé🙂b".encode()]
    assert pieces == ["a", "", "é", "", "", "", "🙂", "b"] and stream.flush() == ""


def test_broken_bytes_are_shown_at_last():
    stream = TextStream(byte_tokenizer().decode)
    assert [stream.push(byte) for byte in b"a\xff"] == ["a", ""]
    assert stream.push(ord("b")) == BROKEN + "b"
    assert stream.push(0xC3) == "" and stream.flush() == BROKEN


@given(st.lists(st.one_of(st.text(max_size=3).map(str.encode), st.binary(max_size=4))))
def test_pieces_join_to_the_text(parts: list[bytes]):
    data, stream = b"".join(parts), TextStream(byte_tokenizer().decode)
    pieces = [stream.push(byte) for byte in data]
    assert "".join(pieces) + stream.flush() == data.decode(errors="replace")
    assert not any(piece.endswith(BROKEN) for piece in pieces)

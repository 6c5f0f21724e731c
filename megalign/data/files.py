"""Files to values: those of a .jsonl or .json file, the paragraphs of a .txt file, each with its line.

A file that cannot be read as a whole raises DataError; what spoils one row only comes out as `Unusable`.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megalign.data.rows import DataError

_SPACE = re.compile(r"[ \t\r\n]*")


class Unusable(Exception):
    """Why one row is bad."""


def kind(path: Path) -> str:
    """ "One of ".jsonl", ".json", ".txt", whether or not .gz follows; DataError for another."""
    inner = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    if inner.suffix.lower() not in (".jsonl", ".json", ".txt"):
        raise DataError(f"{path}: unknown kind of file; known: .jsonl, .json, .txt, each also with .gz")
    return inner.suffix.lower()


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def _why(error: Exception) -> str:
    return getattr(error, "msg", None) or str(error).partition(":")[0]


def _decode(raw: bytes) -> str:
    """Bytes that are not UTF-8 stay as lone surrogates: they spoil the string they are in, not the file."""
    return raw.decode("utf-8", "surrogateescape")


def json_values(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, value) of each row, the value an `Unusable` where the line is not JSON."""
    with _open(path) as file:
        if kind(path) == ".json":
            text = _decode(file.read()).removeprefix("\ufeff")
            if text.lstrip().startswith("["):
                yield from _array_elements(path, text)
                return
            file.seek(0)
        for number, raw in enumerate(file, 1):
            line = _decode(raw).removeprefix("\ufeff").strip()
            if line:
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield number, Unusable(f"not JSON ({_why(error)})")


def _array_elements(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """One element at a time, so that each keeps its line. A broken array is fatal: where does it go on?"""
    decoder = json.JSONDecoder()

    def skip(position: int) -> tuple[int, str]:
        space = _SPACE.match(text, position)
        position = space.end() if space else position
        return position, text[position : position + 1]

    position, line, counted = skip(0)[0] + 1, 1, 0
    while True:
        position, character = skip(position)
        line, counted = line + text.count("\n", counted, position), position
        if character != "]":
            try:
                value, position = decoder.raw_decode(text, position)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}:{line}: the JSON array is broken here ({_why(error)})") from error
            yield line, value
            position, character = skip(position)
        if character == "]":
            position, rest = skip(position + 1)
            if rest:
                raise DataError(
                    f"{path}: the JSON array ends, but {text[position : position + 20]!r} follows"
                )
            return
        if character != ",":
            raise DataError(f"{path}:{line}: the JSON array is broken after this row (',' or ']' is due)")
        position += 1


def text_blocks(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(first line, {"text": lines}) of each run of lines that are not blank."""
    start, lines = 0, []
    with _open(path) as file:
        for number, raw in enumerate(file, 1):
            line = _decode(raw).removeprefix("\ufeff").rstrip("\r\n")
            if line.strip():
                start = start if lines else number
                lines.append(line)
            elif lines:
                yield start, {"text": "\n".join(lines)}
                lines = []
    if lines:
        yield start, {"text": "\n".join(lines)}

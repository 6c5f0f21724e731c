"""Files to values, each with its line: JSON lines and arrays, text, CSV, Parquet, Arrow, and folders of them.

A file that cannot be read as a whole raises DataError; what spoils one row only comes out as `Unusable`. Lines
are counted from 1; where a file has none (Parquet, Arrow, CSV with quoted newlines), rows are.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megalign.data.kinds import FOLDER, data_files, kind
from megalign.data.rows import DataError, Unusable

_SPACE = re.compile(r"[ \t\r\n]*")
CHUNK = 2**20  # bytes of a JSON array read at a time
LONGEST_ROW = 2**28  # characters of one element; past it a string that nobody closed is likelier
_CUT_OFF = 16  # characters before the end of what was read in which an error may be the cut's: a word, an escape
_ROWS = 1024  # of a columnar file, decoded at once


def values(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, value) of each row in order; the value is `Unusable` where the line alone is broken."""
    readers = {
        ".txt": text_blocks,
        ".csv": _csv_rows,
        ".parquet": _parquet_rows,
        ".arrow": _arrow_rows,
        FOLDER: _folder_rows,
    }
    yield from readers.get(kind(path), json_values)(path)


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
            text = _Text(path, file)
            if text.skip_space() == "[":
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


class _Text:
    """The text of a file from where a reader stands; what is behind it is forgotten, what is ahead is read when asked for."""

    def __init__(self, path: Path, file: Any):
        self.path, self.file = path, file
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.ahead, self.position, self.ended = "", 0, False
        self.line, self.counted = 1, 0  # lines begun before `counted`
        self.more()
        self.ahead = self.ahead.removeprefix("\ufeff")

    def more(self) -> None:
        """Read on: as much again as is ahead already, so that a long element is not tried a thousand times."""
        self.here()
        raw = self.file.read(max(CHUNK, len(self.ahead) - self.position))
        self.ended = not raw
        self.ahead = self.ahead[self.position :] + self.decoder.decode(raw, final=self.ended)
        self.position = self.counted = 0

    def skip_space(self) -> str:
        """The next character that is no white space, and stand before it; "" at the end."""
        while True:
            space = _SPACE.match(self.ahead, self.position)
            self.position = space.end() if space else self.position
            if self.position < len(self.ahead) or self.ended:
                return self.ahead[self.position : self.position + 1]
            self.more()

    def value(self, decoder: json.JSONDecoder) -> Any:
        """The JSON value here; raises ValueError or RecursionError."""
        while True:
            try:
                value, end = decoder.raw_decode(self.ahead, self.position)
            except json.JSONDecodeError as error:
                reaches_end = error.msg.startswith("Unterminated string") or error.pos > len(self.ahead) - _CUT_OFF
                if self.ended or not reaches_end:
                    raise
            else:
                if isinstance(value, (dict, list, str)) or end + 3 <= len(self.ahead) or self.ended:  # "1" may go on: "e-5"
                    self.position = end
                    return value
            if len(self.ahead) - self.position > LONGEST_ROW:
                raise ValueError(f"no end of this element within {LONGEST_ROW:,} characters")
            self.more()

    def here(self) -> int:
        """The line, from 1."""
        self.line += self.ahead.count("\n", self.counted, self.position)
        self.counted = self.position
        return self.line


def _array_elements(path: Path, text: _Text) -> Iterator[tuple[int, Any]]:
    """One element at a time, so that each keeps its line. A broken array is fatal: where does it go on?"""
    decoder = json.JSONDecoder()
    text.position += 1  # "["
    character = text.skip_space()
    while character != "]":
        line = text.here()
        try:
            value = text.value(decoder)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{line}: the JSON array is broken here ({_why(error)})") from error
        yield line, value
        character = text.skip_space()
        if character == ",":
            text.position += 1
            character = text.skip_space()
        elif character != "]":
            raise DataError(f"{path}:{line}: the JSON array is broken after this row (',' or ']' is due)")
    text.position += 1
    if text.skip_space():
        rest = text.ahead[text.position : text.position + 20]
        raise DataError(f"{path}: the JSON array ends, but {rest!r} follows")


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


def _csv_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(row, {column: text}); the first row names the columns."""
    with _open(path) as file:
        text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, strict=True)
        try:
            columns = next(reader, [])
            for number, cells in enumerate((cells for cells in reader if cells), 1):
                if len(cells) == len(columns):
                    yield number, dict(zip(columns, cells))
                else:
                    yield number, Unusable(f"has {len(cells)} cells, but there are {len(columns)} columns")
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: the CSV file is broken here ({error})") from error


@contextmanager
def _pyarrow(path: Path) -> Iterator[Any]:
    import pyarrow

    try:
        yield pyarrow
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    with _pyarrow(path):
        from pyarrow import parquet

        with parquet.ParquetFile(path) as file:
            yield from enumerate(_decoded(path, file.iter_batches(batch_size=_ROWS)), 1)


def _arrow_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """The stream format, which `datasets` writes, or the file format (Feather 2)."""
    with _pyarrow(path) as pyarrow, pyarrow.memory_map(str(path)) as file:
        if file.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(file)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        else:
            file.seek(0)
            batches = iter(pyarrow.ipc.open_stream(file))
        yield from enumerate(_decoded(path, batches), 1)


def _decoded(path: Path, batches: Iterator[Any]) -> Iterator[Any]:
    for batch in batches:
        for start in range(0, batch.num_rows, _ROWS):
            part = batch.slice(start, _ROWS)
            try:
                yield from part.to_pylist()
            except (UnicodeDecodeError, ValueError):  # a cell that is not UTF-8: row by row, to lose one only
                for number in range(part.num_rows):
                    try:
                        yield part.slice(number, 1).to_pylist()[0]
                    except ValueError as error:
                        yield Unusable(f"cannot be decoded ({_why(error)})")


def _folder_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """The rows of a data set's files, one file after the other."""
    row = 0
    for file in data_files(path):
        for _, value in values(file):
            row += 1
            yield row, value

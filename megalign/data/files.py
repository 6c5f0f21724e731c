"""Files to values, each with its line: JSON lines and arrays, text, CSV, Parquet, Arrow, folders of `datasets`.

A file that cannot be read as a whole raises DataError; what spoils one row only comes out as `Unusable`. Lines
are counted from 1; where a file has none (Parquet, Arrow, CSV with quoted newlines), rows are.
"""

from __future__ import annotations

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

from megalign.data.rows import DataError, Unusable

KINDS = (".jsonl", ".json", ".txt", ".csv", ".parquet", ".arrow")
FOLDER = "folder"  # what `datasets` writes with save_to_disk
_SPACE = re.compile(r"[ \t\r\n]*")
_ROWS = 1024  # of a columnar file, decoded at once


def kind(path: Path) -> str:
    """One of KINDS, whether or not .gz follows, or FOLDER; DataError for another."""
    if path.is_dir():
        return FOLDER
    inner = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    if inner.suffix.lower() not in KINDS or (inner != path and inner.suffix.lower() in (".parquet", ".arrow")):
        raise DataError(
            f"{path}: unknown kind of file; known: {', '.join(KINDS)}, the first four also with .gz, "
            "and a folder that `datasets` saved"
        )
    return inner.suffix.lower()


def is_data(path: Path) -> bool:
    """Whether there is a file or a saved folder that `values` reads, by its name alone."""
    try:
        if kind(path) == FOLDER:
            return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
    except DataError:
        return False
    return path.is_file()


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
    """A saved data set; of one with splits its `train`, or the only one (name another as FOLDER/SPLIT)."""
    splits, state = path / "dataset_dict.json", path / "state.json"
    try:
        if splits.is_file():
            names = json.loads(splits.read_text(encoding="utf-8"))["splits"]
            chosen = "train" if "train" in names else names[0] if len(names) == 1 else None
            if chosen is None:
                raise DataError(f"{path}: holds the splits {', '.join(names)}; name one, e.g. {path / names[0]}")
            yield from _folder_rows(path / chosen)
            return
        files = [path / part["filename"] for part in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
    except FileNotFoundError:
        raise DataError(
            f"{path}: no file, and no folder that `datasets` saved (it has no state.json or dataset_dict.json)"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: the folder's JSON is broken ({error!r})") from error
    row = 0
    for file in files:
        for _, value in _arrow_rows(file):
            row += 1
            yield row, value

"""One file of a recipe (or the built-in grammar) as a source of rows: what it holds, and a name for exactly that."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from megalign.config.schema import DataConfig
from megalign.data.formats import detect, for_training, read_records
from megalign.data.once import build_once
from megalign.data.rows import AnyRow, DataError, LabelledResponse, Row

GRAMMAR = "grammar"  # in the place of a file name: the built-in toy dialogues
GRAMMAR_ROWS = 10_000  # where data.max_rows gives no number
LARGE = 64 * 2**20  # bytes; a smaller file is hashed anew each time
SETTLED = 10.0  # seconds since the last change of a file whose hash is remembered


@dataclass(frozen=True)
class Source:
    """Rows that can be read again and again, one at a time."""

    name: str
    format: str
    read: Callable[[], Iterator[Any]]
    digest: Callable[[Path], str]  # cache folder -> SHA-256 of what `read` depends on

    def rows(self) -> Iterator[Any]:
        """`Row`s, or what else is taken of the file (`pairs.as_pairs`)."""
        return self.read()


Take = Callable[[AnyRow], Sequence[Any]]  # what is learnt from: none, one or several rows of a row in a file


def supervised(row: AnyRow) -> list[Row]:
    """The dialogue to imitate."""
    return [for_training(row)]


def with_text(row: AnyRow) -> list[Row]:
    """A dialogue to train a tokenizer on: answers that are labelled undesirable too."""
    return [for_training(replace(row, label=True) if isinstance(row, LabelledResponse) else row)]


def open_source(name: str, data: DataConfig, limit: int | None, seed: int, *, held_out: bool, take: Take = supervised) -> Source:
    """The source called `name` in a recipe, at most `limit` rows of it. DataError where there is none."""
    if name == GRAMMAR:
        return _grammar(GRAMMAR_ROWS if limit is None else limit, seed, held_out, take)
    if not Path(name).exists():
        raise DataError(
            f"data file {name!r} does not exist (from {Path.cwd()}); correct data.train or .validation"
        )
    name = str(Path(name))  # as the rows themselves spell it
    format = detect(name) if data.format == "auto" else data.format
    return Source(
        name, format, lambda: islice(chain.from_iterable(map(take, read_records(name, format))), limit), lambda folder: f"{file_digest(Path(name), folder)} {limit}"
    )


def _grammar(count: int, seed: int, held_out: bool, take: Take) -> Source:
    from megalign.data import grammar

    draw = grammar.held_out if held_out else grammar.generate
    drawn = f"{draw.__name__} {count} {seed}"  # the code itself is part of every key
    return Source(GRAMMAR, "messages", lambda: chain.from_iterable(map(take, draw(count, seed))), lambda _: drawn)


def file_digest(path: Path, folder: Path) -> str:
    """SHA-256 of a file, or of a folder of files. That of a large one is taken once and remembered under its size and times: no write leaves
    the time of the last change (ctime) as it was, and nobody can set it."""
    if path.is_dir():  # of `datasets`: its files, each under its name
        parts = (f"{file.relative_to(path)} {file_digest(file, folder)}" for file in sorted(path.rglob("*")) if file.is_file())
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
    stat = path.stat()
    if stat.st_size < LARGE or time.time() - stat.st_ctime < SETTLED:
        return _hash_file(path)
    seen = json.dumps([str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino])
    entry = build_once(folder, f"digest-{hashlib.sha256(seen.encode()).hexdigest()[:32]}", lambda part: _write_digest(part, path))
    return (entry / "sha256").read_text()


def _write_digest(part: Path, path: Path) -> None:
    with open(part / "sha256", "w") as file:
        file.write(_hash_file(path))
        file.flush()
        os.fsync(file.fileno())


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    return digest.hexdigest()

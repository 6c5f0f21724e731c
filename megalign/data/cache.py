"""Tokenised rows on disk, made once and mapped into every process that trains on them.

    CACHE/tokens-KEY/tokens.bin     [T] uint16 or int32: all rows end to end
                     mask.bin       [T] bool: the token is scored
                     rows.bin       [N] of ROW: where each row ends, its line, and what became of it
                     rejected.jsonl the rows that were not used, each with its reason
                     meta.json      sizes

KEY is a hash of everything the bytes follow from: the contents of the file, the format, the template, the tokenizer,
each option of `data` that is not known to be irrelevant, and the code of this package. A changed byte is another key.
An entry may be removed whenever nothing runs (`megalign data cache`, data/prune.py); it is made again.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import time
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from megalign.config.schema import DataConfig, Recipe
from megalign.data.encode import encode_rows
from megalign.data.once import Say, build_once
from megalign.data.rows import BadRow, DataError, Row, TextRow, TooLong
from megalign.data.source import Source
from megalign.data.templates import get_template
from megalign.data.tokenizer import Tokenizer

KEPT, UNREADABLE, REFUSED, TOO_LONG = range(4)  # outcome of a row: unreadable as read, refused or too long when encoded
ROW = np.dtype(
    [("end", "<i8"), ("line", "<i8"), ("cut", "<i4"), ("outcome", "u1"), ("text", "u1")], align=True
)
BLOCK_ROWS, BLOCK_CHARACTERS = 4096, 2**20  # tokenised at a time
RESIDENT = 16 * 2**20  # bytes of one mapped file that may be in this process's memory
FAULT = 2**16  # bytes that Linux maps around a page that is touched (fault_around_bytes)
TELL = 30.0  # seconds between reports of a long tokenisation
# Keys of `data` on which the tokens of a row do not depend. A key that is not listed here makes other entries.
IRRELEVANT = {
    *("train", "validation", "validation_rows", "max_rows", "max_bad_share", "format", "template", "tokenizer"),
    *("packing", "shuffle", "remainder", "balance", "order_by_length", "mixture", "curriculum"),
    *("cache_dir", "cache_timeout", "streaming", "shuffle_window"),
}


def cache_folder(recipe: Recipe) -> Path:
    """`data.cache_dir`, or `.cache` beside the run folder, so that runs beside each other share it."""
    return Path(recipe.data.cache_dir) if recipe.data.cache_dir else Path(recipe.output).absolute().parent / ".cache"


def entry_key(kind: str, **parts: Any) -> str:
    """`KIND-` and a hash of the parts and of this package's code."""
    text = json.dumps({**parts, "code": _code_version()}, sort_keys=True)
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


@cache
def _code_version() -> str:
    """Every module that reads, renders or encodes, and the versions of the libraries below them."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(f"{path.name} {path.stat().st_size} ".encode() + path.read_bytes())
    return digest.hexdigest() + "".join(version(name) for name in ("tokenizers", "transformers", "numpy"))


def encode_key(source: Source, tokenizer: Tokenizer, data: DataConfig, folder: Path) -> dict[str, Any]:
    """All that the tokens of a source follow from, but for the code."""
    return {
        "content": source.digest(folder),
        "source": source.name,  # stands in the reasons of rejected rows
        "format": source.format,
        "template": get_template(data.template, tokenizer.hf).hash,
        "tokenizer": tokenizer.hash,
        "options": data.model_dump(mode="json", exclude=IRRELEVANT),
    }


def encode_once(source: Source, tokenizer: Tokenizer, data: DataConfig, folder: Path) -> Encoded:
    """The tokens of a source: mapped if they are in the cache, else made by one process while the others wait.

    Raises what `build_once` raises, and DataError of data.truncation error, in every process.
    """
    key = entry_key("tokens", **encode_key(source, tokenizer, data, folder))
    path = build_once(
        folder,
        key,
        lambda part: write_encoded(part, source.rows(), tokenizer, data, source.name),
        say=announcer(),
        timeout=data.cache_timeout,
    )
    return Encoded(path)


def announcer() -> Say:
    """Prints what a process waits for, with its number: several may share one terminal."""
    return lambda message: print(f"data (process {os.getpid()}): {message}", flush=True)


def write_encoded(part: Path, rows: Iterator[Row], tokenizer: Tokenizer, data: DataConfig, name: str = "") -> None:
    """Encode rows block by block into the files of an entry; memory holds one block."""
    dtype = np.dtype("<u2") if tokenizer.vocab_size <= 2**16 else np.dtype("<i4")
    count = end = 0
    told = time.monotonic()
    with (
        open(part / "tokens.bin", "wb") as tokens,
        open(part / "mask.bin", "wb") as mask,
        open(part / "rows.bin", "wb") as index,
        open(part / "rejected.jsonl", "w", encoding="utf-8") as rejected,
    ):
        for block in _blocks(rows):
            table = np.zeros(len(block), ROW)
            options = (data.template, data.loss_on, data.sequence_length, data.truncation)
            for number, (row, result) in enumerate(zip(block, encode_rows(block, tokenizer, *options))):
                if isinstance(result, BadRow):
                    outcome = UNREADABLE if isinstance(row, BadRow) else TOO_LONG if isinstance(result, TooLong) else REFUSED
                    rejected.write(json.dumps({"row": count + number, **vars(result)}) + "\n")
                    table[number] = (end, row.line, 0, outcome, 0)
                    continue
                end += len(result)
                tokens.write(result.input_ids.astype(dtype).tobytes())
                mask.write(result.loss_mask.tobytes())
                table[number] = (end, row.line, result.messages_cut, KEPT, isinstance(row, TextRow))
            index.write(table.tobytes())
            count += len(block)
            if time.monotonic() - told > TELL:
                told = time.monotonic()
                announcer()(f"{name}: {count:,} rows tokenised, {end:,} tokens")
        for file in (tokens, mask, index, rejected):
            file.flush()
            os.fsync(file.fileno())
    with open(part / "meta.json", "w") as file:
        json.dump({"rows": count, "tokens": end, "dtype": dtype.str}, file)
        file.flush()
        os.fsync(file.fileno())


def _blocks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    block: list[Row] = []
    size = 0
    for row in rows:
        block.append(row)
        size += _characters(row)
        if len(block) == BLOCK_ROWS or size >= BLOCK_CHARACTERS:
            yield block
            block, size = [], 0
    if block:
        yield block


def _characters(row: Row) -> int:
    if isinstance(row, BadRow):
        return 0
    return len(row.text) if isinstance(row, TextRow) else sum(len(message.content or "") for message in row.messages)


class Mapped:
    """A file as an array of which little is in memory at a time.

    Pages of a mapped file count as memory of each process that has touched them, though the system can take them
    back. So that a run's resident size says something, they are given back (and stay in the page cache, which all
    processes of a node share) before more than RESIDENT bytes were touched.
    """

    def __init__(self, path: Path, dtype: Any):
        self.dtype = np.dtype(dtype)
        size = path.stat().st_size
        self._map: mmap.mmap | None = None
        if size:  # an empty file cannot be mapped
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._array = np.frombuffer(self._map or b"", self.dtype)
        self._touched = 0

    def __len__(self) -> int:
        return len(self._array)

    def read(self, start: int, stop: int) -> np.ndarray:
        """A copy of elements start to stop."""
        found = self._array[start:stop].copy()
        self._touched += found.nbytes + FAULT
        if self._touched > RESIDENT and self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)
            self._touched = 0
        return found


class Encoded:
    """An entry of the cache, opened."""

    def __init__(self, path: Path):
        self.path, self.key = path, path.name
        self.meta = json.loads((path / "meta.json").read_text())
        self.tokens = Mapped(path / "tokens.bin", self.meta["dtype"])
        self.mask = Mapped(path / "mask.bin", bool)
        self.rows = Mapped(path / "rows.bin", ROW)
        if (len(self.tokens), len(self.mask), len(self.rows)) != (self.meta["tokens"], self.meta["tokens"], self.meta["rows"]):
            raise DataError(f"{path} is damaged: its files do not have the sizes of meta.json; remove the folder, it is made again")

    def __len__(self) -> int:
        return len(self.rows)

    def table(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """(tokens before it, ROW entries) of rows start to stop, some thousands at a time."""
        stop = len(self) if stop is None else stop
        before = int(self.rows.read(start - 1, start)["end"][0]) if start else 0
        for first in range(start, stop, 2**16):
            part = self.rows.read(first, min(first + 2**16, stop))
            yield before, part
            before = int(part["end"][-1])

    def rejected(self, start: int, stop: int) -> Iterator[tuple[int, BadRow]]:
        """The rows of a range that were not used, and why."""
        with open(self.path / "rejected.jsonl", encoding="utf-8") as file:
            for line in file:
                value = json.loads(line)
                if start <= (number := value.pop("row")) < stop:
                    yield number, BadRow(**value)

"""Which rows train and which validate, and whether the files are fit to be used at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from megalign.config.schema import DataConfig, Recipe
from megalign.data.cache import REFUSED, UNREADABLE, Encoded
from megalign.data.rows import BadRow, DataError, Row
from megalign.data.source import GRAMMAR, Source, Take, open_source, supervised

BAD_SHOWN = 5


@dataclass
class Look:
    """What is known of the rows of a source once they were read."""

    readable: np.ndarray  # [N] bool
    unusable: int  # rows that were not read, or, where they were tokenised too, that template or tokenizer refused
    bad: list[BadRow]  # the first of them
    encoded: Any = None  # an Encoded, where they were tokenised too


@dataclass
class Piece:
    """Rows start to stop of a source."""

    source: Source
    look: Look
    start: int
    stop: int

    def rows(self) -> Iterator[Row]:
        return islice(self.source.rows(), self.start, self.stop)


@dataclass
class Part:
    """What has one weight in the mixture; without a mixture all there is."""

    name: str
    weight: float
    pieces: list[Piece] = field(default_factory=list)


@dataclass
class Split:
    """Rows, unusable ones among them, read from the files each time they are asked for."""

    parts: list[Part] = field(default_factory=list)

    @property
    def pieces(self) -> list[Piece]:
        return [piece for part in self.parts for piece in part.pieces]

    @property
    def formats(self) -> dict[str, str]:
        return {piece.source.name: piece.source.format for piece in self.pieces}

    @property
    def rows(self) -> Rows:
        return Rows(self.pieces)


class Rows:
    """The rows of some pieces, one at a time, as often as wanted."""

    def __init__(self, pieces: list[Piece]):
        self.pieces = pieces

    def __len__(self) -> int:
        return sum(piece.stop - piece.start for piece in self.pieces)

    def __iter__(self) -> Iterator[Row]:
        for piece in self.pieces:
            yield from piece.rows()


def read_splits(recipe: Recipe, look: Callable[[Source], Look] | None = None, take: Take = supervised) -> tuple[Split, Split]:
    """Rows to train on and rows to validate on.

    Without `data.validation` the last `data.validation_rows` of data.train are set apart (of each source of a
    mixture, by its weight). `data.max_rows` bounds the rows read of data.train (of each source of a mixture), those
    set apart included. The built-in grammar validates on combinations that its training rows never contain.
    Raises DataError for a missing or empty file and past `data.max_bad_share`.
    """
    data, seed = recipe.data, recipe.train.seed
    look = look or scan
    if data.mixture is None:
        train = Split([Part("", 1.0, _read(data.train, data, data.max_rows, seed, look, take))])
    else:
        total = sum(part.weight for part in data.mixture)
        train = Split([Part(p.name, p.weight / total, _read(p.path, data, data.max_rows, seed, look, take)) for p in data.mixture])
    check_bad(train.pieces, data)
    if data.validation is not None or data.validation_rows == 0:
        return train, read_validation(recipe, look, take)
    if data.mixture is None and data.train == GRAMMAR:
        return train, _validation(_read(GRAMMAR, data, data.validation_rows, seed, look, take, held_out=True), data)
    validation = Part("", 1.0)
    for part, count in zip(train.parts, shares_of(data.validation_rows, [part.weight for part in train.parts])):
        part.pieces, apart = _set_apart(part.pieces, count, part.name)
        validation.pieces += apart
    return train, Split([validation])


def read_validation(recipe: Recipe, look: Callable[[Source], Look], take: Take = supervised) -> Split:
    """The rows of data.validation alone."""
    data = recipe.data
    if data.validation is None:
        return Split()
    return _validation(_read(data.validation, data, None, recipe.train.seed, look, take, held_out=True), data)


def shares_of(count: int, weights: list[float]) -> list[int]:
    """Whole numbers that sum to `count`, as near to the weights as whole numbers can be (largest remainders)."""
    exact = [count * weight / sum(weights) for weight in weights]
    whole = [int(value) for value in exact]
    for index in sorted(range(len(exact)), key=lambda i: whole[i] - exact[i])[: count - sum(whole)]:
        whole[index] += 1
    return whole


def scan(source: Source) -> Look:
    """Read a source through once."""
    readable, bad = bytearray(), []
    for row in source.rows():
        readable.append(not isinstance(row, BadRow))
        if isinstance(row, BadRow) and len(bad) < BAD_SHOWN:
            bad.append(row)
    return Look(np.frombuffer(bytes(readable), bool), len(readable) - sum(readable), bad)


def look_at(encoded: Encoded) -> Look:
    """What tokenisation has found. A row that is only too long is not unusable."""
    outcomes = np.concatenate([table["outcome"] for _, table in encoded.table()] or [np.zeros(0, "u1")])
    unusable = (outcomes == UNREADABLE) | (outcomes == REFUSED)
    bad = (row for number, row in encoded.rejected(0, len(encoded)) if unusable[number])
    return Look(outcomes != UNREADABLE, int(unusable.sum()), list(islice(bad, BAD_SHOWN)), encoded)


def listing(bad: list[BadRow], count: int, total: int | None = None) -> str:
    """The first `count` bad rows, a line each, for the end of an error message; `total`: how many there are."""
    lines = [f"\n  {row.source}:{row.line}: {row.reason}" for row in bad[:count]]
    more = (len(bad) if total is None else total) - count
    return "".join(lines) + (f"\n  and {more} more" if more > 0 else "")


def _read(
    sources: str | list[str],
    data: DataConfig,
    max_rows: int | None,
    seed: int,
    look: Callable[[Source], Look],
    take: Take,
    held_out: bool = False,
) -> list[Piece]:
    pieces: list[Piece] = []
    for name in [sources] if isinstance(sources, str) else sources:
        left = None if max_rows is None else max_rows - sum(piece.stop for piece in pieces)
        if left == 0:
            break
        source = open_source(name, data, left, seed, held_out=held_out, take=take)
        seen = look(source)
        if not len(seen.readable):
            raise DataError(f"{source.name}: the file holds no rows")
        pieces.append(Piece(source, seen, 0, len(seen.readable)))
    return pieces


def _validation(pieces: list[Piece], data: DataConfig) -> Split:
    check_bad(pieces, data)
    return Split([Part("", 1.0, pieces)])


def _set_apart(pieces: list[Piece], count: int, name: str) -> tuple[list[Piece], list[Piece]]:
    """The pieces up to the last `count` readable rows, and those from there on."""
    if count == 0:
        return pieces, []
    total = sum(int(piece.look.readable.sum()) for piece in pieces)
    if count >= total:
        where = f"the mixture's source {name!r} has {count} of them to give, but" if name else "data.train has"
        raise DataError(
            f"data.validation_rows is {count}, but {where} {total} "
            "readable rows: none would be left to train on; lower it (0: no validation), or give data.validation"
        )
    kept, apart = list(pieces), []
    while count:
        last = kept.pop()
        readable = np.flatnonzero(last.look.readable)
        if len(readable) <= count:
            apart.insert(0, last)
            count -= len(readable)
            continue
        cut = int(readable[-count])
        kept.append(Piece(last.source, last.look, 0, cut))
        apart.insert(0, Piece(last.source, last.look, cut, last.stop))
        count = 0
    return kept, apart


def check_bad(pieces: list[Piece], data: DataConfig) -> None:
    rows = sum(len(piece.look.readable) for piece in pieces)
    bad = sum(piece.look.unusable for piece in pieces)
    if bad / max(rows, 1) > data.max_bad_share:
        first = [row for piece in pieces for row in piece.look.bad]
        raise DataError(
            f"{bad} of {rows} rows are unusable: {bad / rows:.2%}, and data.max_bad_share allows "
            f"{data.max_bad_share:.2%}; correct them, or raise it{listing(first, BAD_SHOWN, bad)}"
        )

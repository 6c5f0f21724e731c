"""The packs of a split: which documents of the cache stand together in a training row.

    CACHE/packs-KEY/documents.bin   [D] of DOCUMENT, pack after pack
                    ends.bin        [P] int64: where in them each pack ends
                    tokens.bin      [P] int64: tokens of each pack
                    statistics.json what became of every row

Made once as the tokens are; a row is cut out of the token cache when it is asked for, so memory holds none.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np

from megalign.config.schema import DataConfig
from megalign.data.cache import KEPT, TOO_LONG, Encoded, Mapped
from megalign.data.packing import pack_arrays, pack_in_order
from megalign.data.rows import BadRow, Conversation, DataError, Example, TextRow
from megalign.data.splits import Piece

DOCUMENT = np.dtype([("start", "<i8"), ("length", "<i4"), ("piece", "<i4")])
OUTCOMES = ("rows_read", "rows_kept", "bad", "truncated", "truncated_away", "documents_split")
REJECTED_SHOWN = 20
WINDOW = 2**18  # documents packed together: memory stays bounded, and nothing is lost among so many


class Packs(Sequence[list[Example]]):
    """Rows of an entry, read when asked for."""

    def __init__(self, folder: Path, encoded: list[Encoded]):
        self._encoded = encoded
        self._documents, self._ends = Mapped(folder / "documents.bin", DOCUMENT), Mapped(folder / "ends.bin", "<i8")
        self.tokens = np.fromfile(folder / "tokens.bin", "<i8")  # [P]
        self.statistics: dict[str, Any] = json.loads((folder / "statistics.json").read_text())

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> list[Example]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[Example]]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start, stop = self._ends.read(index - 1, index + 1) if index else (0, self._ends.read(0, 1)[0])
        return [cut_out(self._encoded[piece], start, length) for start, length, piece in self._documents.read(start, stop).tolist()]


def cut_out(encoded: Encoded, start: int, length: int) -> Example:
    """A document: its first token is unscored, for nothing predicts it (see `encode.split_document`)."""
    mask = encoded.mask.read(start, start + length)
    mask[:1] = False
    return Example(encoded.tokens.read(start, start + length).astype(np.int32), mask)


class Kept(Sequence[Conversation | TextRow]):
    """The readable rows of which something is trained on, read from the files again."""

    def __init__(self, pieces: list[Piece], count: int):
        self._pieces, self._count = pieces, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return list(self)[index]
        return next(islice(iter(self), range(len(self))[index], None))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __iter__(self) -> Iterator[Conversation | TextRow]:
        for piece in self._pieces:
            rows = piece.rows()
            for _, table in piece.look.encoded.table(piece.start, piece.stop):
                for entry in table:
                    row = next(rows, None)
                    if row is None or row.line != entry["line"] or (entry["outcome"] == KEPT and isinstance(row, BadRow)):
                        raise DataError(f"{piece.source.name} has changed since it was tokenised; start again with the file as it is")
                    if entry["outcome"] == KEPT and not isinstance(row, BadRow):
                        yield row


def write_packs(part: Path, pieces: list[Piece], data: DataConfig, grain: int) -> None:
    """Pack the documents of some pieces into the files of an entry.

    grain: packs leave room for documents rounded up to it.
    """
    capacity, count, tokens, scored = data.sequence_length, 0, 0, 0
    encoded = [piece.look.encoded for piece in pieces]
    digest = hashlib.sha256()  # over every token, mask and pack boundary
    with open(part / "documents.bin", "wb") as table, open(part / "ends.bin", "wb") as ends, open(part / "tokens.bin", "wb") as sizes:
        written = 0
        for documents in _windows(pieces, capacity, whole=data.order_by_length):
            order, bounds = _arrange(documents["length"], data, grain)
            documents = documents[order]
            table.write(documents.tobytes())
            ends.write((bounds + written).astype("<i8").tobytes())
            starts = np.concatenate([[0], bounds[:-1]])
            sizes.write(np.add.reduceat(documents["length"].astype("<i8"), starts).astype("<i8").tobytes())
            for start, stop in zip(starts, bounds):
                digest.update(f"pack {stop - start}".encode())
                for begin, length, piece in documents[start:stop].tolist():
                    example = cut_out(encoded[piece], begin, length)
                    digest.update(f"row {length}".encode())
                    digest.update(example.input_ids.tobytes())
                    digest.update(example.loss_mask.tobytes())
                    scored += int(np.count_nonzero(example.loss_mask))
            tokens += int(documents["length"].sum(dtype=np.int64))
            count, written = count + len(bounds), written + len(documents)
        for file in (table, ends, sizes):
            file.flush()
            os.fsync(file.fileno())
    statistics = {
        **account(pieces, capacity),
        "tokens": tokens,
        "scored_tokens": scored,
        "packs": count,
        "fill_share": tokens / (count * capacity) if count else 0.0,
        "sequence_length": capacity,
        "fingerprint": digest.hexdigest(),
    }
    with open(part / "statistics.json", "w") as file:
        json.dump(statistics, file)
        file.flush()
        os.fsync(file.fileno())


def _arrange(lengths: np.ndarray, data: DataConfig, grain: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents in the order of their packs, and where in it each pack ends."""
    room = np.minimum(-(-lengths // grain) * grain, data.sequence_length)
    if not data.order_by_length:
        return pack_arrays(room, data.sequence_length) if data.packing else _one_each(len(room))
    by_length = np.argsort(lengths, kind="stable")
    _, ends = pack_in_order(room[by_length], data.sequence_length) if data.packing else _one_each(len(room))
    return by_length, ends


def _one_each(count: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(count), np.arange(1, count + 1)


def _windows(pieces: list[Piece], capacity: int, *, whole: bool) -> Iterator[np.ndarray]:
    """Documents in the order of the files, WINDOW at a time, or all together."""
    waiting, count = [], 0
    for number, piece in enumerate(pieces):
        for before, table in piece.look.encoded.table(piece.start, piece.stop):
            waiting.append(_documents(before, table, capacity, number))
            count += len(waiting[-1])
            while count >= WINDOW and not whole:
                joined = np.concatenate(waiting)
                yield joined[:WINDOW]
                waiting, count = [joined[WINDOW:]], count - WINDOW
    if count:
        yield np.concatenate(waiting)


def _documents(before: int, table: np.ndarray, capacity: int, piece: int) -> np.ndarray:
    """Kept rows as documents: a conversation is one, a text is cut as `encode.split_document` cuts it."""
    starts = np.concatenate([[before], table["end"][:-1]])
    kept = table["outcome"] == KEPT
    starts, ends, text = starts[kept], table["end"][kept], table["text"][kept].astype(bool)
    lengths = ends - starts
    chunks = np.where(text, -(-np.maximum(lengths - 1, 1) // (capacity - 1)), 1)
    found = np.zeros(int(chunks.sum()), DOCUMENT)
    first = np.repeat(np.cumsum(chunks) - chunks, chunks)
    found["start"] = np.repeat(starts, chunks) + (np.arange(len(found)) - first) * (capacity - 1)
    found["length"] = np.minimum(np.repeat(ends, chunks) - found["start"], capacity)
    found["piece"] = piece
    return found


def account(pieces: list[Piece], capacity: int) -> dict[str, Any]:
    """What became of each row, in all and by source. Each is kept, bad or longer than fits."""
    per_source: dict[str, dict[str, Any]] = {}
    rejected: list[BadRow] = []
    for piece in pieces:
        source = per_source.setdefault(piece.source.name, {"format": piece.source.format, **dict.fromkeys(OUTCOMES, 0)})
        for before, table in piece.look.encoded.table(piece.start, piece.stop):
            kept, too_long = table["outcome"] == KEPT, table["outcome"] == TOO_LONG
            lengths = np.diff(table["end"], prepend=before)
            for outcome, rows in (
                ("rows_read", np.ones(len(table), bool)),
                ("rows_kept", kept),
                ("bad", ~kept & ~too_long),
                ("truncated", kept & (table["cut"] > 0)),
                ("truncated_away", too_long),
                ("documents_split", kept & (table["text"] > 0) & (lengths > capacity)),
            ):
                source[outcome] += int(rows.sum())
        rejected += [row for _, row in islice(piece.look.encoded.rejected(piece.start, piece.stop), REJECTED_SHOWN - len(rejected))]
    return {
        **{outcome: sum(counts[outcome] for counts in per_source.values()) for outcome in OUTCOMES},
        "rejected": [vars(row) for row in rejected],
        "sources": per_source,
    }

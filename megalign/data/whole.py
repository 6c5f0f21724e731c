"""What pairs, judgements and labelled answers share as data sets: rows that are used whole or not at all.

# P rows of a source, each with one or two sides; N rows of a data set
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

import numpy as np

from megalign.config.schema import Recipe
from megalign.data.cache import KEPT, REFUSED, TOO_LONG, UNREADABLE
from megalign.data.dataset import PackRange
from megalign.data.packs import OUTCOMES, REJECTED_SHOWN
from megalign.data.rows import BadRow, Conversation, Example
from megalign.data.splits import BAD_SHOWN, Look, Piece, Split


class EncodedRows(Protocol):
    """The tokenised rows of a source."""

    outcomes: np.ndarray  # [P]
    lengths: np.ndarray  # [P, 2] tokens of each side

    def rejected(self, start: int, stop: int, outcomes: tuple[int, ...] = (UNREADABLE, REFUSED, TOO_LONG)) -> Iterator[BadRow]:
        """The rows of a range that are not used, and why, once each."""
        ...


def look_at_whole(found: EncodedRows) -> Look:
    """What a source holds, for `read_splits`."""
    unusable = int((~np.isin(found.outcomes, (KEPT, TOO_LONG))).sum())
    bad = islice(found.rejected(0, len(found.outcomes), (UNREADABLE, REFUSED)), BAD_SHOWN)
    return Look(found.outcomes != UNREADABLE, unusable, list(bad), found)


class WholeRows(Sequence[list[Example]]):
    """The kept rows of the pieces of a split; a subclass reads one from the cache when asked for."""

    def __init__(self, pieces: Sequence[Piece]):
        sources: list[EncodedRows] = [piece.look.encoded for piece in pieces]
        kept = [np.flatnonzero(source.outcomes[piece.start : piece.stop] == KEPT) + piece.start for source, piece in zip(sources, pieces)]
        self.piece = np.concatenate([np.full(len(rows), number) for number, rows in enumerate(kept)] or [np.zeros(0, np.int64)])  # [N] which one
        self.row = np.concatenate([*kept, np.zeros(0, np.int64)])  # [N] of its source
        self.lengths = np.concatenate([*(source.lengths[rows] for source, rows in zip(sources, kept)), np.zeros((0, 2), np.int64)])
        self.tokens = self.lengths.sum(-1)

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.read(range(len(self))[index])

    @abstractmethod
    def read(self, index: int) -> list[Example]:
        """The examples of a row."""


class KeptWhole(Sequence[Conversation]):
    """A dialogue of every row in a data set, read from the files again; a subclass says which, and of which rows."""

    def __init__(self, pieces: Sequence[Piece], rows: WholeRows):
        self._pieces, self._rows = pieces, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return list(islice(self, *index.indices(len(self)))) if isinstance(index, slice) else next(islice(iter(self), range(len(self))[index], None))

    def read_again(self) -> Iterator[Any]:
        """The rows as the files hold them."""
        for number, piece in enumerate(self._pieces):
            wanted = set(self._rows.row[self._rows.piece == number].tolist())
            yield from (row for index, row in enumerate(piece.rows(), piece.start) if index in wanted)


def mixture_parts(recipe: Recipe, split: Split, piece_N: np.ndarray) -> list[PackRange]:
    """Where the rows of each source of data.mixture stand; none without a mixture. piece_N: the piece that each row is of."""
    if recipe.data.mixture is None or len(split.parts) != len(recipe.data.mixture):
        return []
    parts, start, first = [], 0, 0
    for part in split.parts:
        count = int(np.isin(piece_N, np.arange(first, first + len(part.pieces))).sum())
        parts.append(PackRange(part.name, part.weight, start, start + count))
        start, first = start + count, first + len(part.pieces)
    return parts


def account_of_whole(pieces: Sequence[Piece]) -> dict[str, Any]:
    """What became of each row, in all and by source, as `packs.account` says it."""
    sources: dict[str, dict[str, Any]] = {}
    rejected: list[BadRow] = []
    for piece in pieces:
        counts = sources.setdefault(piece.source.name, {"format": piece.source.format, **dict.fromkeys(OUTCOMES, 0)})
        found: EncodedRows = piece.look.encoded
        outcomes = found.outcomes[piece.start : piece.stop]
        kept, too_long = outcomes == KEPT, outcomes == TOO_LONG
        for name, which in (("rows_read", np.ones(len(outcomes), bool)), ("rows_kept", kept), ("truncated_away", too_long), ("bad", ~kept & ~too_long)):
            counts[name] += int(which.sum())
        rejected += islice(found.rejected(piece.start, piece.stop), REJECTED_SHOWN - len(rejected))
    return {
        **{name: sum(counts[name] for counts in sources.values()) for name in OUTCOMES},
        "rejected": [vars(row) for row in rejected],
        "sources": sources,
    }


def sizes(tokens_N: np.ndarray, scored: int, capacity: int, fingerprint: str) -> dict[str, Any]:
    """Of rows that are a pack each."""
    tokens = int(tokens_N.sum())
    return {
        "tokens": tokens,
        "scored_tokens": scored,
        "packs": len(tokens_N),
        "fill_share": tokens / (len(tokens_N) * capacity) if len(tokens_N) else 0.0,
        "sequence_length": capacity,
        "fingerprint": fingerprint,
    }

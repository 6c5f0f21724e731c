"""From a recipe to training rows: read, split, tokenise, pack, and account for every row.

Each row read is kept, bad, or too long for anything of it to fit: the three counts sum to `rows_read`. Tokens and
packs are made once, by one process, in a cache that all ranks map (see `cache` and `packs`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megalign.config.schema import DataConfig, Recipe
from megalign.data.cache import announcer, cache_folder, encode_once, entry_key
from megalign.data.encode import check_template, plain_texts
from megalign.data.once import build_once
from megalign.data.packs import OUTCOMES, REJECTED_SHOWN, Kept, Packs, write_packs
from megalign.data.rows import BadRow, Conversation, DataError, Example, Row, TextRow
from megalign.data.source import Source, with_text
from megalign.data.splits import Look, Piece, Split, listing, look_at, read_splits, read_validation
from megalign.data.stream import Stream, open_stream
from megalign.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

# Packs leave room for documents rounded up to this, whatever the layout, so that runs with another
# context-parallel size (up to 4, which cuts documents in 8) train on the same packs and resume each other.
DOCUMENT_GRAIN = 8


@dataclass(frozen=True)
class PackRange:
    """The packs of one source of a mixture."""

    name: str
    weight: float  # all sum to 1
    start: int
    stop: int


@dataclass
class Dataset:
    """Packs ready for `megalign.batch.collate`, the rows they were made of, and what became of every row."""

    rows: Sequence[list[Example]]  # one entry a pack
    tokenizer: Tokenizer
    statistics: dict[str, Any]
    kept: Sequence[Conversation | TextRow]  # the readable rows that are in `rows`, in the order of the files
    tokens: np.ndarray  # [packs] int64, without padding
    parts: list[PackRange] = field(default_factory=list)  # of a mixture

    def __len__(self) -> int:
        return len(self.rows)


def build_datasets(recipe: Recipe) -> tuple[Dataset, Dataset]:
    """The training and the validation set of a recipe; the same on every rank.

    Raises DataError with file, line and reason: a missing or empty file, more unusable rows than
    `data.max_bad_share`, nothing scored.
    """
    folder = cache_folder(recipe)
    tokenizer = tokenizer_of(recipe)

    def look(source: Source) -> Look:
        return encoded_look(recipe, source, tokenizer, folder)

    if recipe.data.streaming:
        train = _streamed(recipe, tokenizer, folder)
        validation = build_dataset(recipe, read_validation(recipe, look), tokenizer, folder)
    else:
        train, validation = (build_dataset(recipe, split, tokenizer, folder) for split in read_splits(recipe, look))
    for key, dataset in (("train", train), ("validation", validation)):
        counts = dataset.statistics
        if counts["rows_read"] and not counts["scored_tokens"]:
            raise DataError(
                f"data.{key}: no token is scored; of {counts['rows_read']} rows {counts['bad']} are "
                f"unusable and {counts['truncated_away']} longer than data.sequence_length({recipe.data.sequence_length})"
                f"{listing([BadRow(**row) for row in counts['rejected']], 5)}"
            )
    return train, validation


def tokenizer_of(recipe: Recipe) -> Tokenizer:
    """The recipe's tokenizer; training rows are read only if it must be trained."""
    if recipe.data.tokenizer.path or recipe.model.init_from:
        return make_tokenizer(recipe, ())
    return make_tokenizer(recipe, read_splits(recipe, take=with_text)[0].rows)


def make_tokenizer(recipe: Recipe, rows: Iterable[Row]) -> Tokenizer:
    """The tokenizer the recipe names, or that of `model.init_from`, or one trained on `rows` (read more than once)."""
    data = recipe.data
    path = data.tokenizer.path or recipe.model.init_from
    if path is None:
        texts = (text for row in rows for text in plain_texts(row, data.template))
        tokenizer = train_tokenizer(texts, data.tokenizer.vocab_size, data.template, data.tokenizer.special_tokens)
    else:
        tokenizer = load_tokenizer(path, data.template, data.tokenizer.special_tokens)
    _check_rendering(rows, tokenizer, data)
    return tokenizer


def _check_rendering(rows: Iterable[Row], tokenizer: Tokenizer, data: DataConfig) -> None:
    """DataError where conversations would be rendered otherwise than a server renders them. All rows are of one kind."""
    if isinstance(next((row for row in rows if not isinstance(row, BadRow)), None), Conversation):
        check_template(tokenizer, data.template, data.loss_on)


def encoded_look(recipe: Recipe, source: Source, tokenizer: Tokenizer, folder: Path) -> Look:
    """A source, tokenised."""
    _check_rendering(source.rows(), tokenizer, recipe.data)
    return look_at(encode_once(source, tokenizer, recipe.data, folder))


def build_dataset(recipe: Recipe, split: Split, tokenizer: Tokenizer, folder: Path) -> Dataset:
    """Pack the rows of a split, each source of a mixture on its own."""
    built = [_packs_once(recipe, part.pieces, _grain(recipe), folder) for part in split.parts]
    statistics = _joined([packs.statistics for packs in built], recipe.data.sequence_length)
    kept = Kept(split.pieces, statistics["rows_kept"])
    parts, start = [], 0
    if recipe.data.mixture is not None and len(built) == len(recipe.data.mixture):
        for part, packs in zip(split.parts, built):
            parts.append(PackRange(part.name, part.weight, start, start + len(packs)))
            start += len(packs)
            if not len(packs) and part.weight:
                raise DataError(f"data.mixture: nothing of {part.name!r} can be trained on; correct its file, or give it weight 0")
    tokens = np.concatenate([packs.tokens for packs in built]) if built else np.zeros(0, np.int64)
    return Dataset(built[0] if len(built) == 1 else Joined(built), tokenizer, statistics, kept, tokens, parts)


def _packs_once(recipe: Recipe, pieces: list[Piece], grain: int, folder: Path) -> Packs:
    data, encoded = recipe.data, [piece.look.encoded for piece in pieces]
    key = entry_key(
        "packs",
        pieces=[(piece.look.encoded.key, piece.start, piece.stop) for piece in pieces],
        options=[data.sequence_length, data.packing, data.order_by_length, grain],
    )
    path = build_once(folder, key, lambda part: write_packs(part, pieces, data, grain), say=announcer(), timeout=data.cache_timeout)
    return Packs(path, encoded)


def _streamed(recipe: Recipe, tokenizer: Tokenizer, folder: Path) -> Dataset:
    """Packs by window; what is said of the rows is said of the first window."""
    source = open_stream(recipe)
    _check_rendering(source.rows(), tokenizer, recipe.data)
    stream = Stream(source, recipe, tokenizer, folder, _grain(recipe))
    first = stream.window(0)
    statistics = {
        **first.packs.statistics,
        "fingerprint": stream.fingerprint,
        "streaming": {"shuffle_window": stream.size, "counts": "rows of the first window"},
    }
    return Dataset(stream, tokenizer, statistics, Kept([first.piece], statistics["rows_kept"]), first.packs.tokens)


def _grain(recipe: Recipe) -> int:
    return max(DOCUMENT_GRAIN, 2 * recipe.parallel.context_parallel_size)


class Joined(Sequence[list[Example]]):
    """Several sequences end to end."""

    def __init__(self, parts: Sequence[Sequence[list[Example]]]):
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[part][index - (int(self._ends[part - 1]) if part else 0)]

    def __iter__(self) -> Iterator[list[Example]]:
        for part in self._parts:
            yield from part


def _joined(statistics: list[dict[str, Any]], capacity: int) -> dict[str, Any]:
    """The statistics of all parts together."""
    if len(statistics) == 1:
        return statistics[0]
    sums = {name: sum(part[name] for part in statistics) for name in (*OUTCOMES, "tokens", "scored_tokens", "packs")}
    return {
        **sums,
        "rejected": [row for part in statistics for row in part["rejected"]][:REJECTED_SHOWN],
        "fill_share": sums["tokens"] / (sums["packs"] * capacity) if sums["packs"] else 0.0,
        "sequence_length": capacity,
        "sources": {name: counts for part in statistics for name, counts in part["sources"].items()},
        "fingerprint": hashlib.sha256("".join(part["fingerprint"] for part in statistics).encode()).hexdigest(),
    }

"""Pairs of answers as training rows: chosen and rejected side by side, each scored on its answer alone.

A row is `[chosen, rejected]`, two examples that begin with the same prompt, tokenised once a side; the template puts a
control token between prompt and answer, so no token crosses the boundary. The pair has to fit into `data.sequence_length`
together, because the two stand in one packed batch; one that does not is left out and counted, never shortened: a
shortened answer is another answer.

Each example carries `values`: the pair's `weight`, its `row`, and, once known, `ref_logprob`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megalign.config.schema import DataConfig, Recipe
from megalign.data import grammar
from megalign.data.cache import (
    KEPT,
    REFUSED,
    TOO_LONG,
    UNREADABLE,
    Encoded,
    announcer,
    cache_folder,
    encode_key,
    entry_key,
    write_encoded,
)
from megalign.data.dataset import DOCUMENT_GRAIN, Dataset, tokenizer_of
from megalign.data.encode import check_template
from megalign.data.once import build_once
from megalign.data.packs import cut_out
from megalign.data.rows import (
    AnyRow,
    BadRow,
    Conversation,
    DataError,
    Example,
    Message,
    PreferencePair,
    RankedResponses,
    Response,
)
from megalign.data.source import Source
from megalign.data.splits import Look, Piece, Split, listing, read_splits
from megalign.data.tokenizer import Tokenizer
from megalign.data.whole import (
    KeptWhole,
    WholeRows,
    account_of_whole,
    look_at_whole,
    mixture_parts,
    sizes,
)


def as_pairs(row: AnyRow) -> list[PreferencePair | BadRow]:
    """The pairs in one row of a file: of a ranking each untied pair, of anything that is no judgement a BadRow.

    A dialogue of the built-in grammar becomes one: its answer, and one that breaks the grammar's rules.
    """
    match row:
        case PreferencePair() | BadRow():
            return [row]
        case RankedResponses():
            return list(row.pairs())
        case Conversation(source="grammar", messages=(*prompt, answer)):
            false = Message("assistant", grammar.wrong(answer.content, row.line))
            return [PreferencePair(tuple(prompt), Response((answer,)), Response((false,)), source=row.source, line=row.line)]
        case _:
            return [BadRow(row.source, row.line, "holds no chosen and rejected answer: dpo learns from pairs")]


def sides(pair: PreferencePair) -> tuple[Conversation, Conversation]:
    """Chosen and rejected as conversations of which the answer alone is scored."""
    prompt = tuple(replace(message, scored=False) if message.role == "assistant" else message for message in pair.prompt)
    chosen, rejected = (
        Conversation((*prompt, *response.messages), pair.source, pair.line, pair.tools) for response in (pair.chosen, pair.rejected)
    )
    return chosen, rejected


@dataclass
class EncodedPairs:
    """Tokenised pairs of a source: rows 2i and 2i + 1 of `encoded` are the sides of pair i."""

    encoded: Encoded
    weights: np.ndarray  # [P]
    outcomes: np.ndarray  # [P]
    starts: np.ndarray  # [P, 2] of each side in the tokens
    lengths: np.ndarray  # [P, 2]
    lines: np.ndarray  # [P] of the file
    source: str

    def rejected(self, start: int, stop: int, outcomes: tuple[int, ...] = (UNREADABLE, REFUSED, TOO_LONG)) -> Iterator[BadRow]:
        """The pairs of a range that are not used, and why, once each."""
        sides = {side // 2: row for side, row in self.encoded.rejected(2 * start, 2 * stop)}
        for pair in (np.flatnonzero(np.isin(self.outcomes[start:stop], outcomes)) + start).tolist():
            together = f"{self.lengths[pair].sum()} tokens, both sides together: too many for data.sequence_length"
            yield sides.get(pair) or BadRow(self.source, int(self.lines[pair]), together)


def encode_pairs(source: Source, tokenizer: Tokenizer, data: DataConfig, folder: Path) -> EncodedPairs:
    """The tokens of a source of pairs, from the cache or made once."""
    options = data.model_copy(update={"truncation": "drop"})
    key = entry_key("pairs", **encode_key(source, tokenizer, options, folder))

    def write(part: Path) -> None:
        weights: list[float] = []

        def both() -> Iterator[Conversation | BadRow]:
            for row in source.rows():
                weights.append(getattr(row, "weight", 0.0))
                yield from (row, row) if isinstance(row, BadRow) else sides(row)

        write_encoded(part, both(), tokenizer, options, source.name)
        np.array(weights, "<f8").tofile(part / "weights.bin")

    path = build_once(folder, key, write, say=announcer(), timeout=data.cache_timeout)
    encoded = Encoded(path)
    table = np.concatenate([part for _, part in encoded.table()]) if len(encoded) else encoded.rows.read(0, 0)
    ends = table["end"].reshape(-1, 2)
    starts = np.concatenate([[0], table["end"][:-1]]).reshape(-1, 2) if len(table) else ends
    lengths = ends - starts
    outcomes = table["outcome"].reshape(-1, 2)
    room = (-(-lengths // DOCUMENT_GRAIN) * DOCUMENT_GRAIN).sum(-1)
    worst = np.where((outcomes == KEPT).all(-1), KEPT, np.where(outcomes[:, 0] != KEPT, outcomes[:, 0], outcomes[:, 1]))
    worst = np.where((worst == KEPT) & (room > data.sequence_length), TOO_LONG, worst)
    return EncodedPairs(encoded, np.fromfile(path / "weights.bin", "<f8"), worst, starts, lengths, table["line"][::2], source.name)


def build_pairs(recipe: Recipe) -> tuple[Dataset, Dataset]:
    """The training and the validation pairs of a recipe; the same on every rank.

    Raises DataError as `build_datasets` does.
    """
    for key, value, fix in (("loss_on", "all", "prompts would be in the sum of both sides; set it to assistant"), ("streaming", True, "pairs are read as a whole; set it to false")):
        if getattr(recipe.data, key) == value:
            raise DataError(f"data.{key} is {value!r}, and this is preference data: {fix}")
    folder, tokenizer = cache_folder(recipe), tokenizer_of(recipe)

    def look(source: Source) -> Look:
        first = next((row for row in source.rows() if isinstance(row, PreferencePair)), None)
        if first is not None:
            check_template(tokenizer, recipe.data.template, recipe.data.loss_on)
        return look_at_whole(encode_pairs(source, tokenizer, recipe.data, folder))

    train, validation = (build_pair_set(recipe, split, tokenizer) for split in read_splits(recipe, look, as_pairs))
    for key, dataset in (("train", train), ("validation", validation)):
        counts = dataset.statistics
        if counts["rows_read"] and not len(dataset):
            raise DataError(
                f"data.{key}: no pair is left; of {counts['rows_read']} {counts['bad']} are unusable and {counts['truncated_away']} do not "
                f"fit: both answers, prompts included, in data.sequence_length({recipe.data.sequence_length}) tokens"
                f"{listing([BadRow(**row) for row in counts['rejected']], 5)}"
            )
    return train, validation


def build_pair_set(recipe: Recipe, split: Split, tokenizer: Tokenizer) -> Dataset:
    """The pairs of a split as a data set whose rows are `[chosen, rejected]`."""
    rows = PairRows(split.pieces)
    return Dataset(rows, tokenizer, _statistics(rows, split, recipe.data.sequence_length), KeptPairs(split.pieces, rows), rows.tokens, mixture_parts(recipe, split, rows.piece))


class PairRows(WholeRows):
    """Pairs read from the cache when asked for. `columns[name]`: [P, 2] values that the examples carry."""

    def __init__(self, pieces: Sequence[Piece]):
        super().__init__(pieces)
        self._pairs: list[EncodedPairs] = [piece.look.encoded for piece in pieces]
        weights = np.concatenate([*(pairs.weights[self.row[self.piece == number]] for number, pairs in enumerate(self._pairs)), np.zeros(0)])
        numbers = np.arange(len(self.row), dtype=np.float64)
        self.columns: dict[str, np.ndarray] = {name: np.stack([x, x], -1) for name, x in (("weight", weights), ("row", numbers))}

    def read(self, index: int) -> list[Example]:
        """[chosen, rejected]."""
        pairs, row = self._pairs[self.piece[index]], self.row[index]
        chosen, rejected = (cut_out(pairs.encoded, int(pairs.starts[row, side]), int(pairs.lengths[row, side])) for side in (0, 1))
        values = [{name: float(column[index, side]) for name, column in self.columns.items()} for side in (0, 1)]
        return [replace(chosen, values=values[0]), replace(rejected, values=values[1], shared=shared_prompt(chosen, rejected))]


def shared_prompt(chosen: Example, rejected: Example) -> int:
    """Tokens at the front of both sides that the rejected one need not repeat: the prompt without its last token, which
    predicts each side's first."""
    length = min(len(chosen), len(rejected))
    differ = np.flatnonzero(chosen.input_ids[:length] != rejected.input_ids[:length])
    same = int(differ[0]) if len(differ) else length
    return max(0, min(same, int(rejected.loss_mask.argmax()) - 1))


class KeptPairs(KeptWhole):
    """The chosen side of every pair in a data set, read from the files again: prompts to answer, with a reference."""

    def __iter__(self) -> Iterator[Conversation]:
        return (Conversation((*pair.prompt, *pair.chosen.messages), pair.source, pair.line, pair.tools) for pair in self.pairs())

    def pairs(self) -> Iterator[PreferencePair]:
        """The pairs themselves."""
        return self.read_again()


def _statistics(rows: PairRows, split: Split, capacity: int) -> dict[str, Any]:
    """What became of each pair; `fingerprint` is over every token and weight."""
    digest = hashlib.sha256()
    scored = 0
    for pair in rows:
        for example in pair:
            digest.update(f"side {len(example)} {example.values['weight']!r}".encode() + example.input_ids.tobytes() + example.loss_mask.tobytes())
            scored += int(np.count_nonzero(example.loss_mask))
    return {**account_of_whole(split.pieces), **sizes(rows.tokens, scored, capacity, digest.hexdigest())}

"""Labelled answers as training rows.

A row is `[answer]`: one example of which the answer alone is scored. An answer that does not fit into
`data.sequence_length` with its prompt is left out and counted, never shortened: a shortened answer is another answer.
Examples carry `values`: the row's `weight`, its number `row`, `desirable` (1 or 0), `held_out` (1 in the validation
set), and, once known, `ref_logprob`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megalign.config.schema import DataConfig, Recipe
from megalign.data import grammar
from megalign.data.cache import KEPT, Encoded, announcer, cache_folder, encode_key, entry_key, write_encoded
from megalign.data.dataset import Dataset, tokenizer_of
from megalign.data.encode import check_template
from megalign.data.once import build_once
from megalign.data.packs import Kept, account, cut_out
from megalign.data.rows import (
    AnyRow,
    BadRow,
    Conversation,
    DataError,
    Example,
    LabelledResponse,
    Message,
    PreferencePair,
    Response,
)
from megalign.data.source import Source
from megalign.data.splits import Look, Piece, Split, listing, look_at, read_splits
from megalign.data.tokenizer import Tokenizer
from megalign.data.whole import mixture_parts, sizes

JUDGEMENT = np.dtype([("weight", "<f8"), ("desirable", "u1")])


def as_answers(row: AnyRow) -> list[LabelledResponse | BadRow]:
    """The labelled answers in one row of a file: of a pair both sides, as TRL does; of anything without a label a BadRow.

    A dialogue of the built-in grammar becomes one: its answer, or, every second time, one that breaks the grammar's rules.
    """
    match row:
        case LabelledResponse() | BadRow():
            return [row]
        case PreferencePair():
            return [
                LabelledResponse(row.prompt, response, label, row.weight, row.provenance, row.source, row.line)
                for response, label in ((row.chosen, True), (row.rejected, False))
            ]
        case Conversation(source="grammar", messages=(*prompt, answer)):
            right = row.line % 2 == 1
            said = answer if right else Message("assistant", grammar.wrong(answer.content, row.line))
            return [LabelledResponse(tuple(prompt), Response((said,)), right, source=row.source, line=row.line)]
        case _:
            return [BadRow(row.source, row.line, "holds no label: kto learns from answers that are called desirable or not")]


def dialogue(answer: LabelledResponse) -> Conversation:
    """A conversation of which the answer alone is scored."""
    prompt = tuple(replace(message, scored=False) if message.role == "assistant" else message for message in answer.prompt)
    return Conversation((*prompt, *answer.response.messages), answer.source, answer.line)


def encode_answers(source: Source, tokenizer: Tokenizer, data: DataConfig, folder: Path) -> Encoded:
    """The tokens of a source of labelled answers, from the cache or made once; `judgement.bin` beside them."""
    options = data.model_copy(update={"truncation": "drop"})

    def write(part: Path) -> None:
        judgements: list[tuple[float, bool]] = []

        def rows() -> Iterator[Conversation | BadRow]:
            for row in source.rows():
                judgements.append((0.0, False) if isinstance(row, BadRow) else (row.weight, row.label))
                yield row if isinstance(row, BadRow) else dialogue(row)

        write_encoded(part, rows(), tokenizer, options, source.name)
        np.array(judgements, JUDGEMENT).tofile(part / "judgement.bin")

    key = entry_key("answers", **encode_key(source, tokenizer, options, folder))
    return Encoded(build_once(folder, key, write, say=announcer(), timeout=data.cache_timeout))


def build_answers(recipe: Recipe) -> tuple[Dataset, Dataset]:
    """The training and the validation answers of a recipe; the same on every rank.

    Raises DataError as `build_datasets` does.
    """
    for key, value, fix in (("loss_on", "all", "prompts would be in the sum; set it to assistant"), ("streaming", True, "labelled answers are read as a whole; set it to false")):
        if getattr(recipe.data, key) == value:
            raise DataError(f"data.{key} is {value!r}, and this is preference data: {fix}")
    folder, tokenizer = cache_folder(recipe), tokenizer_of(recipe)

    def look(source: Source) -> Look:
        if any(isinstance(row, LabelledResponse) for row in source.rows()):
            check_template(tokenizer, recipe.data.template, recipe.data.loss_on)
        return look_at(encode_answers(source, tokenizer, recipe.data, folder))

    splits = read_splits(recipe, look, as_answers)
    train, validation = (build_answer_set(recipe, split, tokenizer, held_out=bool(number)) for number, split in enumerate(splits))
    for key, dataset in (("train", train), ("validation", validation)):
        counts = dataset.statistics
        if counts["rows_read"] and not len(dataset):
            raise DataError(
                f"data.{key}: no answer is left; of {counts['rows_read']} {counts['bad']} are unusable and {counts['truncated_away']} do not "
                f"fit into data.sequence_length({recipe.data.sequence_length}) tokens{listing([BadRow(**row) for row in counts['rejected']], 5)}"
            )
    return train, validation


def build_answer_set(recipe: Recipe, split: Split, tokenizer: Tokenizer, *, held_out: bool) -> Dataset:
    """The labelled answers of a split as a data set."""
    rows = AnswerRows(split.pieces, held_out)
    return Dataset(rows, tokenizer, _statistics(rows, split, recipe.data.sequence_length), Wanted(split.pieces, len(rows)), rows.lengths, mixture_parts(recipe, split, rows.piece))


class AnswerRows(Sequence[list[Example]]):
    """Answers read from the cache when asked for. `columns[name]`: [N, 1] values that the examples carry."""

    def __init__(self, pieces: list[Piece], held_out: bool):
        self._encoded: list[Encoded] = [piece.look.encoded for piece in pieces]
        found = [_kept(piece) for piece in pieces]
        self.piece = np.concatenate([np.full(len(rows), number) for number, rows in enumerate(found)] or [np.zeros(0, np.int64)])
        table = np.concatenate([*found, np.zeros(0, _ROW)])
        self.starts, self.lengths = table["start"], table["length"]
        fixed = {"weight": table["weight"], "row": np.arange(len(table)), "desirable": table["desirable"], "held_out": np.full(len(table), held_out)}
        self.columns: dict[str, np.ndarray] = {name: column.astype(np.float64)[:, None] for name, column in fixed.items()}

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return [replace(self.example(index), values=values_of(self.columns, index))]

    def example(self, index: int) -> Example:
        """A row's tokens."""
        index = range(len(self))[index]
        return cut_out(self._encoded[self.piece[index]], int(self.starts[index]), int(self.lengths[index]))


class Wanted(Kept):
    """The desirable answers of a data set, read from the files again: prompts to answer, with a reference."""

    def __iter__(self) -> Iterator[Conversation]:
        return (dialogue(row) for row in self.judged() if row.label)

    def judged(self) -> Iterator[LabelledResponse]:
        """All of them."""
        rows: Iterator[Any] = super().__iter__()
        return rows


_ROW = np.dtype([("start", "<i8"), ("length", "<i8"), *JUDGEMENT.descr])


def _kept(piece: Piece) -> np.ndarray:
    """_ROW of the kept rows of a piece."""
    encoded: Encoded = piece.look.encoded
    judgements = np.fromfile(encoded.path / "judgement.bin", JUDGEMENT)[piece.start : piece.stop]
    tables = list(encoded.table(piece.start, piece.stop))
    found = np.zeros(len(judgements), _ROW)
    if tables:
        table = np.concatenate([part for _, part in tables])
        found["start"] = np.concatenate([[tables[0][0]], table["end"][:-1]])
        found["length"] = table["end"] - found["start"]
        found["weight"], found["desirable"] = judgements["weight"], judgements["desirable"]
        found = found[table["outcome"] == KEPT]
    return found


def values_of(columns: dict[str, np.ndarray], index: int) -> dict[str, float]:
    """What an example carries."""
    return {name: float(column[index, 0]) for name, column in columns.items()}


def _statistics(rows: AnswerRows, split: Split, capacity: int) -> dict[str, Any]:
    """What became of each row; `fingerprint` is over every token, label and weight."""
    digest, scored = hashlib.sha256(), 0
    for row in range(len(rows)):
        example = rows.example(row)
        judgement = "answer {} {weight} {desirable}".format(len(example), **values_of(rows.columns, row))
        digest.update(judgement.encode() + example.input_ids.tobytes() + example.loss_mask.tobytes())
        scored += int(np.count_nonzero(example.loss_mask))
    desirable = int(rows.columns["desirable"].sum())
    return {**account(split.pieces, capacity), "desirable": desirable, **sizes(rows.lengths, scored, capacity, digest.hexdigest())}

"""What reward models learn from: pairs of answers, and single answers with labels, in one data set.

A row is one or two examples, each a whole dialogue up to the judged answer. Like pairs for DPO, a row that does not fit
into `data.sequence_length` is left out and counted, never shortened.

Each example carries `values`: `weight`, `row`, `side` (1 chosen, -1 rejected, 0 a single answer), `margin`, and for each head
of rm.heads its label, NaN where the row says nothing of it. Of a pair a head's label is 1, or -1 where the SECOND answer is the
better one by this head's measure; a pair without `labels` speaks to every bradley_terry head.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from megalign.config.schema import DataConfig, HeadConfig, Recipe
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
from megalign.data.labels import OBSERVED
from megalign.data.once import build_once
from megalign.data.packs import cut_out
from megalign.data.pairs import as_pairs, shared_prompt
from megalign.data.pairs import sides as both_sides
from megalign.data.rows import (
    AnyRow,
    BadRow,
    Conversation,
    DataError,
    Example,
    LabelledResponse,
    PreferencePair,
    ScoredResponse,
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

Judgement = PreferencePair | ScoredResponse
Heads = Mapping[str, HeadConfig]
PAIRED = "bradley_terry"
TIMES = ("exponential", "weibull")


def as_judgements(row: AnyRow, heads: Heads) -> list[Judgement | BadRow]:
    """The judgements in one row of a file; a BadRow where no head learns from it, or a label cannot be one of its head's."""
    match row:
        case LabelledResponse():
            labels = (("label", float(row.label)),)
            found: list[Any] = [ScoredResponse(row.prompt, row.response, labels, row.provenance, row.source, row.line)]
        case ScoredResponse():
            found = [row]
        case Conversation(source="grammar"):
            found = [*as_pairs(row), *(_toy_labels(row) if any(head.loss != PAIRED for head in heads.values()) else ())]
        case _:
            found = list(as_pairs(row))
    return [judged if isinstance(judged, BadRow) else _checked(judged, heads) for judged in found]


def _toy_labels(row: Conversation) -> list[ScoredResponse]:
    """The right and the wrong answer of a toy dialogue, with labels: whether it is right, how many words it has."""
    (pair,) = as_pairs(row)
    assert isinstance(pair, PreferencePair)
    return [
        ScoredResponse(pair.prompt, side, (("right", float(side is pair.chosen)), ("words", float(len(side.text.split())))), source=row.source, line=row.line)
        for side in (pair.chosen, pair.rejected)
    ]


def _checked(row: Judgement, heads: Heads) -> Judgement | BadRow:
    known = 0
    for name, head in heads.items():
        for value, observed in labels_of(row, name, head):
            if math.isnan(value):
                continue
            known += 1
            if (rule := _broken_rule(value, observed, head)) is not None:
                return BadRow(row.source, row.line, f"label {head.label or name!r} is {value:g}: head {name} is {head.loss}, which takes {rule}")
    if known:
        return row
    given = sorted({name for name, _ in (row.labels if isinstance(row, PreferencePair) else row.scores)})
    told = f"its labels are {', '.join(given)}" if given else "it is a pair" if isinstance(row, PreferencePair) else "it has none"
    return BadRow(row.source, row.line, f"no head of rm.heads ({', '.join(f'{name}: {head.loss}' for name, head in heads.items())}) learns from this row: {told}")


def _broken_rule(value: float, observed: float, head: HeadConfig) -> str | None:
    if head.loss == "binary" and value not in (0, 1):
        return "true and false" if head.within is None else "times above 0 (within is given)"
    if head.classes is not None and (value != int(value) or not 0 <= value < head.classes):
        return f"whole numbers from 0 to {head.classes - 1}"
    if head.loss in TIMES and not (value > 0 and observed in (0, 1)):
        return "times above 0, with observed true or false"
    if head.loss == "regression" and head.scale == "log1p" and value <= -1:
        return "numbers above -1 (scale log1p)"
    return None


def labels_of(row: Judgement, name: str, head: HeadConfig) -> list[tuple[float, float]]:
    """(label, observed) of each answer of a row for one head; NaN: unknown."""
    key, nothing = head.label or name, math.nan
    if isinstance(row, ScoredResponse):
        known = dict(row.scores)
        if head.loss == PAIRED:
            return [(nothing, 1.0)]
        value, observed = known.get(key, nothing), known.get(key + OBSERVED, 1.0)
        return [(value if head.within is None else came_within(value, bool(observed), head.within), observed)]
    if head.loss == PAIRED:
        better = dict(row.labels).get(key, nothing) if row.labels else 1.0
        return [(float(np.sign(better)) or nothing, 1.0)] * 2
    scores = (row.chosen.score, row.rejected.score)  # of the answers themselves, where the file has them
    return [(nothing if key != "score" or score is None else score, 1.0) for score in scores]


def came_within(time: float, observed: bool, limit: float) -> float:
    """1 where the event came by `limit`, 0 where it had not come then, NaN where nobody looked that long; a time that is none as it is."""
    if not time > 0:
        return -1.0 if time <= 0 else math.nan
    return 0.0 if time > limit else 1.0 if observed else math.nan


def conversations(row: Judgement) -> list[Conversation]:
    """The dialogues that a row holds, each up to a judged answer."""
    if isinstance(row, PreferencePair):
        return list(both_sides(row))
    prompt = tuple(replace(message, scored=False) if message.role == "assistant" else message for message in row.prompt)
    return [Conversation((*prompt, *row.response.messages), row.source, row.line)]


@dataclass
class EncodedRows:
    """The tokenised rows of a source. `lengths` 0: a single answer has no second side."""

    encoded: Encoded
    facts: list[dict[str, Any]]  # of each row
    outcomes: np.ndarray  # [P]
    starts: np.ndarray  # [P, 2] of each side in the tokens
    lengths: np.ndarray  # [P, 2]
    first: np.ndarray  # [P + 1] number of a row's first document in `encoded`
    lines: np.ndarray  # [P] of the file
    source: str

    def rejected(self, start: int, stop: int, outcomes: tuple[int, ...] = (UNREADABLE, REFUSED, TOO_LONG)) -> Iterator[BadRow]:
        """The rows of a range that are not used, and why, once each."""
        reasons = {}
        for document, row in self.encoded.rejected(int(self.first[start]), int(self.first[stop])):
            reasons.setdefault(int(np.searchsorted(self.first, document, side="right")) - 1, row)
        for index in (np.flatnonzero(np.isin(self.outcomes[start:stop], outcomes)) + start).tolist():
            together = f"{self.lengths[index].sum()} tokens, both sides together: too many for data.sequence_length"
            yield reasons.get(index) or BadRow(self.source, int(self.lines[index]), together)


def encode_judgements(source: Source, tokenizer: Tokenizer, data: DataConfig, heads: Heads, folder: Path) -> EncodedRows:
    """The tokens of a source of judgements, from the cache or made once."""
    options = data.model_copy(update={"truncation": "drop"})
    key = entry_key("judged", heads={name: head.model_dump(include={"loss", "label", "classes", "scale", "within"}) for name, head in heads.items()}, **encode_key(source, tokenizer, options, folder))

    def write(part: Path) -> None:
        with open(part / "facts.jsonl", "w") as file:

            def answers() -> Iterator[Conversation | BadRow]:
                for row in source.rows():
                    found = [row] if isinstance(row, BadRow) else conversations(row)
                    file.write(json.dumps({} if isinstance(row, BadRow) else _facts(row, heads)) + "\n")
                    yield from found

            write_encoded(part, answers(), tokenizer, options, source.name)

    path = build_once(folder, key, write, say=announcer(), timeout=data.cache_timeout)
    encoded = Encoded(path)
    facts = [json.loads(line) for line in (path / "facts.jsonl").read_text().splitlines()]
    sides = np.array([fact.get("sides", 1) for fact in facts], np.int64)
    first = np.concatenate([np.zeros(1, np.int64), sides.cumsum()])
    table = np.concatenate([part for _, part in encoded.table()]) if len(encoded) else encoded.rows.read(0, 0)
    ends = np.concatenate([np.zeros(1, np.int64), table["end"].astype(np.int64)])
    two, last = sides == 2, first[1:] - 1
    starts = np.stack([ends[first[:-1]], ends[last]], -1)
    lengths = np.stack([np.diff(ends)[first[:-1]], np.where(two, np.diff(ends)[last], 0)], -1) if len(facts) else starts
    one, other = table["outcome"][first[:-1]], table["outcome"][last]
    worst = np.where(one != KEPT, one, other)
    room = (-(-lengths // DOCUMENT_GRAIN) * DOCUMENT_GRAIN).sum(-1)
    worst = np.where((worst == KEPT) & (room > data.sequence_length), TOO_LONG, worst)
    return EncodedRows(encoded, facts, worst, starts, lengths, first, table["line"][first[:-1]], source.name)


def _facts(row: Judgement, heads: Heads) -> dict[str, Any]:
    """What a row's examples carry: a value, or one a side."""
    pair = isinstance(row, PreferencePair)
    labels = {}
    for name, head in heads.items():
        found = labels_of(row, name, head)
        labels[name] = [None if math.isnan(value) else value for value, _ in found]
        if head.loss in TIMES:
            labels[name + OBSERVED] = [observed for _, observed in found]
    return {"sides": 2 if pair else 1, "weight": row.weight if pair else 1.0, "margin": (row.margin or 0.0) if pair else 0.0, "labels": labels}


class JudgedRows(WholeRows):
    """Rows read from the cache when asked for. `columns[name]`: [P, 2] values that the examples carry."""

    def __init__(self, pieces: Sequence[Piece], names: Sequence[str]):
        super().__init__(pieces)
        self._sources: list[EncodedRows] = [piece.look.encoded for piece in pieces]
        facts = [self._sources[piece].facts[row] for piece, row in zip(self.piece.tolist(), self.row.tolist())]
        self.paired = np.array([fact["sides"] == 2 for fact in facts], bool)

        def column(one: Any, other: Any = None) -> np.ndarray:
            return np.stack([np.array(one, np.float64), np.array(one if other is None else other, np.float64)], -1).reshape(-1, 2)

        self.columns: dict[str, np.ndarray] = {
            "weight": column([fact["weight"] for fact in facts]),
            "row": column(np.arange(len(facts)).tolist()),
            "side": column(self.paired * 1.0, self.paired * -1.0),
            "margin": column([fact["margin"] for fact in facts]),
        }
        for name in names:
            found = [[math.nan if value is None else value for value in fact["labels"][name]] for fact in facts]
            self.columns[name] = column([values[0] for values in found], [values[-1] for values in found])

    def read(self, index: int) -> list[Example]:
        """[chosen, rejected], or [answer]."""
        source, row = self._sources[self.piece[index]], self.row[index]
        found = []
        for side in range(2 if self.paired[index] else 1):
            example = cut_out(source.encoded, int(source.starts[row, side]), int(source.lengths[row, side]))
            shared = shared_prompt(found[0], example) if side else 0
            found.append(replace(example, values={name: float(column[index, side]) for name, column in self.columns.items()}, shared=shared))
        return found


class KeptRows(KeptWhole):
    """The first answer of every row in a data set, read from the files again."""

    def __iter__(self) -> Iterator[Conversation]:
        return (conversations(row)[0] for row in self.judgements())

    def judgements(self) -> Iterator[Judgement]:
        """The rows themselves."""
        return self.read_again()


def build_judgements(recipe: Recipe) -> tuple[Dataset, Dataset]:
    """The training and the validation rows of a reward model's recipe; the same on every rank.

    Raises DataError as `build_datasets` does.
    """
    if recipe.data.streaming:
        raise DataError("data.streaming is true, and judgements are read as a whole: set it to false")
    folder, tokenizer, heads = cache_folder(recipe), tokenizer_of(recipe), recipe.rm.heads

    def look(source: Source) -> Look:
        if any(isinstance(row, (PreferencePair, ScoredResponse)) for row in islice(source.rows(), 100)):
            check_template(tokenizer, recipe.data.template, recipe.data.loss_on)
        return look_at_whole(encode_judgements(source, tokenizer, recipe.data, heads, folder))

    train, validation = (build_judged_set(recipe, split, tokenizer) for split in read_splits(recipe, look, lambda row: as_judgements(row, heads)))
    for key, dataset in (("train", train), ("validation", validation)):
        counts = dataset.statistics
        if counts["rows_read"] and not len(dataset):
            raise DataError(
                f"data.{key}: no row is left; of {counts['rows_read']} {counts['bad']} are unusable and {counts['truncated_away']} do not "
                f"fit: all answers of a row, prompts included, in data.sequence_length({recipe.data.sequence_length}) tokens"
                f"{listing([BadRow(**row) for row in counts['rejected']], 5)}"
            )
    for name, head in heads.items():
        if np.isnan(train.rows.columns[name]).all():  # pyright: ignore[reportAttributeAccessIssue]
            what = "no pair" if head.loss == PAIRED else f"no row with a label {head.label or name!r}"
            raise DataError(f"data.train has {what} for head {name!r} (rm.heads.{name}.loss={head.loss}): nothing would teach it; remove the head, or add rows")
    return train, validation


def build_judged_set(recipe: Recipe, split: Split, tokenizer: Tokenizer) -> Dataset:
    """The rows of a split as a data set whose rows are `[chosen, rejected]` or `[answer]`."""
    heads = recipe.rm.heads
    names = [*heads, *(name + OBSERVED for name, head in heads.items() if head.loss in TIMES)]
    rows = JudgedRows(split.pieces, names)
    statistics = _statistics(rows, split, recipe.data.sequence_length, names)
    return Dataset(rows, tokenizer, statistics, KeptRows(split.pieces, rows), rows.tokens, mixture_parts(recipe, split, rows.piece))


def _statistics(rows: JudgedRows, split: Split, capacity: int, names: Sequence[str]) -> dict[str, Any]:
    """What became of each row; `fingerprint` is over every token, weight and label."""
    digest = hashlib.sha256()
    scored = 0
    for row in rows:
        for example in row:
            digest.update(f"side {len(example)} {[*example.values.values()]!r}".encode() + example.input_ids.tobytes())
            scored += int(np.count_nonzero(example.loss_mask))
    labels = {name: int((~np.isnan(rows.columns[name])).any(-1).sum()) for name in names if not name.endswith(OBSERVED)}
    return {**account_of_whole(split.pieces), "labels": labels, **sizes(rows.tokens, scored, capacity, digest.hexdigest())}

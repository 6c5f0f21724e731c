"""The mismatched answers from which KTO estimates its baseline: prompts with answers that belong to other prompts.

The mismatched answer of a row is its own prompt with the answer of the row before it, cyclically in each block of
`train.global_batch_size` rows in the order of the files: TRL's rule (trl 1.16, kto_trainer.py:1141), with its batch of
one device replaced by the global one, and with no answer given back to its own prompt. The pairing is fixed before training: the same for every layout, every epoch and
after every resume, and a cached reference covers it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from megalign.config.schema import Recipe
from megalign.data.answers import AnswerRows, values_of
from megalign.data.dataset import Dataset
from megalign.data.rows import DataError, Example


def mismatched(dataset: Dataset, recipe: Recipe) -> Dataset:
    """The mismatched answer of every row, as a data set in the same order."""
    rows = dataset.rows
    assert isinstance(rows, AnswerRows)
    shifted = MismatchedRows(rows, recipe.train.global_batch_size, recipe.data.sequence_length)
    made_from = f"{dataset.statistics['fingerprint']} {shifted.partner.tolist()} {shifted.capacity}"
    statistics = {**dataset.statistics, "fingerprint": hashlib.sha256(made_from.encode()).hexdigest()}
    return Dataset(shifted, dataset.tokenizer, statistics, dataset.kept, shifted.lengths, dataset.parts)


def partners(prompts: np.ndarray, block: int) -> np.ndarray:
    """[N] the row whose answer each row's prompt is given, from a number [N] that names each row's prompt.

    The one before it, cyclically in blocks; where rows of one prompt follow each other (the two sides of a pair), the
    first one further back that gives no row of the block an answer to its own prompt, or as few as can be. A single row
    at the end joins the block before it; a set of a single row has no other answer than its own. Raises DataError for blocks of one.
    """
    count = len(prompts)
    if block < 2:
        raise DataError(f"kto compares answers with those of other prompts: blocks of train.global_batch_size({block}) hold none; give 2 or more")
    bounds = list(range(0, count, block))
    if len(bounds) > 1 and count - bounds[-1] == 1:
        bounds.pop()
    found = np.arange(count)
    for start, stop in zip(bounds, [*bounds[1:], count]):
        shift = _shift(prompts[start:stop])
        found[start:stop] = np.roll(found[start:stop], shift)
    return found


def _shift(prompts: np.ndarray) -> int:
    collisions: dict[int, int] = {}
    for shift in range(1, len(prompts)):
        collisions[shift] = int(np.count_nonzero(prompts == np.roll(prompts, shift)))
        if not collisions[shift]:
            return shift
    return min(collisions, key=collisions.__getitem__, default=0)


class MismatchedRows(Sequence[list[Example]]):
    """Every row's prompt with its partner's answer, cut where it does not fit (TRL cuts at max_length alike)."""

    def __init__(self, rows: AnswerRows, block: int, capacity: int):
        self.rows, self.capacity = rows, capacity
        prompts = [example.input_ids[: np.argmax(example.loss_mask)] for example in map(rows.example, range(len(rows)))]
        names: dict[bytes, int] = {}
        self.partner = partners(np.array([names.setdefault(prompt.tobytes(), len(names)) for prompt in prompts], np.int64), block)
        lengths = np.array([len(prompt) for prompt in prompts], np.int64)
        self.lengths = np.minimum(lengths + (rows.lengths - lengths)[self.partner], capacity)
        self.columns = {name: column.copy() for name, column in rows.columns.items()}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        own, other = self.rows.example(index), self.rows.example(int(self.partner[index]))
        prompt, answer = int(np.argmax(own.loss_mask)), int(np.argmax(other.loss_mask))
        ids = np.concatenate([own.input_ids[:prompt], other.input_ids[answer:]])[: self.capacity]
        mask = np.concatenate([own.loss_mask[:prompt], other.loss_mask[answer:]])[: self.capacity]
        return [Example(ids, mask, values=values_of(self.columns, index))]

"""From a recipe to training rows: read, split, tokenise, pack, and account for every row.

Each row read is kept, bad, or too long for anything of it to fit: the three counts sum to `rows_read`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from megalign.config.schema import DataConfig, Recipe
from megalign.data.encode import check_template, encode_rows, plain_texts, split_document
from megalign.data.packing import pack
from megalign.data.rows import BadRow, Conversation, DataError, Example, Row, TextRow, TooLong
from megalign.data.splits import Split, listing, read_splits
from megalign.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

OUTCOMES = ("rows_read", "rows_kept", "bad", "truncated", "truncated_away", "documents_split")
REJECTED_SHOWN = 20
# Packs leave room for documents rounded up to this, whatever the layout, so that runs with another
# context-parallel size (up to 4, which cuts documents in 8) train on the same packs and resume each other.
DOCUMENT_GRAIN = 8


@dataclass
class Dataset:
    """Packs ready for `megalign.batch.collate`, the rows they were made of, and what became of every row."""

    rows: list[list[Example]]  # one entry a pack
    tokenizer: Tokenizer
    statistics: dict[str, Any]
    kept: list[Conversation | TextRow]  # the readable rows that are in `rows`, in the order of the files

    def __len__(self) -> int:
        return len(self.rows)


def build_datasets(recipe: Recipe) -> tuple[Dataset, Dataset]:
    """The training and the validation set of a recipe; the same on every rank.

    Raises DataError with file, line and reason: a missing or empty file, more unusable rows than
    `data.max_bad_share`, nothing scored.
    """
    splits = read_splits(recipe)
    tokenizer = make_tokenizer(recipe, splits[0].rows)
    grain = max(DOCUMENT_GRAIN, 2 * recipe.parallel.context_parallel_size)
    train, validation = (build_dataset(split, tokenizer, recipe.data, grain) for split in splits)
    for key, dataset in (("train", train), ("validation", validation)):
        counts = dataset.statistics
        if counts["rows_read"] and not counts["scored_tokens"]:
            raise DataError(
                f"data.{key}: no token is scored; of {counts['rows_read']} rows {counts['bad']} are "
                f"unusable and {counts['truncated_away']} longer than data.sequence_length({recipe.data.sequence_length})"
                f"{listing([BadRow(**row) for row in counts['rejected']], 5)}"
            )
    return train, validation


def make_tokenizer(recipe: Recipe, rows: list[Row]) -> Tokenizer:
    """The tokenizer the recipe names, or that of `model.init_from`, or one trained on `rows`."""
    data = recipe.data
    path = data.tokenizer.path or recipe.model.init_from
    if path is None:
        texts = (text for row in rows for text in plain_texts(row, data.template))
        tokenizer = train_tokenizer(texts, data.tokenizer.vocab_size, data.template, data.tokenizer.special_tokens)
    else:
        tokenizer = load_tokenizer(path, data.template, data.tokenizer.special_tokens)
    if any(isinstance(row, Conversation) for row in rows):
        check_template(tokenizer, data.template, data.loss_on)
    return tokenizer


def build_dataset(
    split: Split, tokenizer: Tokenizer, data: DataConfig, grain: int = DOCUMENT_GRAIN
) -> Dataset:
    """Tokenise and pack the rows of a split."""
    capacity = data.sequence_length
    results = list(encode_rows(split.rows, tokenizer, data.template, data.loss_on, capacity, data.truncation))
    kept: list[Conversation | TextRow] = []
    examples: list[Example] = []
    for row, result in zip(split.rows, results):
        if isinstance(row, BadRow) or isinstance(result, BadRow):
            continue
        kept.append(row)
        examples += split_document(result, capacity) if isinstance(row, TextRow) else [result]

    room = [min(-(-len(example) // grain) * grain, capacity) for example in examples]
    groups = pack(room, capacity) if data.packing else [[number] for number in range(len(examples))]
    packs = [[examples[number] for number in group] for group in groups]
    return Dataset(packs, tokenizer, _account(split, results, packs, capacity), kept)


def _account(
    split: Split, results: list[Example | BadRow], packs: list[list[Example]], capacity: int
) -> dict[str, Any]:
    """What became of each row, in all and by source, and how full the packs are."""
    per_source = {source: dict.fromkeys(OUTCOMES, 0) for source in split.formats}
    for row, result in zip(split.rows, results):
        counts = per_source[row.source]
        counts["rows_read"] += 1
        if isinstance(result, BadRow):
            counts["truncated_away" if isinstance(result, TooLong) else "bad"] += 1
        else:
            counts["rows_kept"] += 1
            counts["truncated"] += result.messages_cut > 0
            counts["documents_split"] += isinstance(row, TextRow) and len(result) > capacity
    rejected = [vars(result) for result in results if isinstance(result, BadRow)]
    tokens = sum(len(example) for group in packs for example in group)
    return {
        **{outcome: sum(counts[outcome] for counts in per_source.values()) for outcome in OUTCOMES},
        "rejected": rejected[:REJECTED_SHOWN],
        "tokens": tokens,
        "scored_tokens": sum(int(example.loss_mask.sum()) for group in packs for example in group),
        "packs": len(packs),
        "fill_share": tokens / (len(packs) * capacity) if packs else 0.0,
        "sequence_length": capacity,
        "sources": {
            source: {"format": split.formats[source], **per_source[source]} for source in split.formats
        },
        "fingerprint": _fingerprint(packs),
    }


def _fingerprint(packs: list[list[Example]]) -> str:
    """SHA-256 over every token, mask and pack boundary: equal on all ranks, and for a run and its resume."""
    digest = hashlib.sha256()
    for group in packs:
        digest.update(f"pack {len(group)}".encode())
        for example in group:
            digest.update(f"row {len(example)}".encode())
            digest.update(example.input_ids.tobytes())
            digest.update(example.loss_mask.tobytes())
    return digest.hexdigest()

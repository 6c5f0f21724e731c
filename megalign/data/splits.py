"""Which rows train and which validate, and whether the files are fit to be used at all."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from megalign.config.schema import DataConfig, Recipe
from megalign.data.formats import detect, read_rows
from megalign.data.rows import BadRow, DataError, Row

GRAMMAR = "grammar"  # in the place of a file name: the built-in toy dialogues
GRAMMAR_ROWS = 10_000  # where data.max_rows gives no number


@dataclass
class Split:
    """Rows as read, unusable ones among them, and the format found in each source."""

    rows: list[Row] = field(default_factory=list)
    formats: dict[str, str] = field(default_factory=dict)


def read_splits(recipe: Recipe) -> tuple[Split, Split]:
    """Rows to train on and rows to validate on.

    Without `data.validation` the last `data.validation_rows` of data.train are set apart. `data.max_rows`
    bounds the rows read of data.train, those set apart included. The built-in grammar validates on
    combinations that its training rows never contain. Raises DataError for a missing or empty file and past
    `data.max_bad_share`.
    """
    data, seed = recipe.data, recipe.train.seed
    train = _read(data.train, data, data.max_rows, seed, held_out=False)
    if data.validation is not None:
        return train, _read(data.validation, data, None, seed, held_out=True)
    if data.validation_rows == 0:
        return train, Split()
    if data.train == GRAMMAR:
        return train, _read(GRAMMAR, data, data.validation_rows, seed, held_out=True)
    readable = [number for number, row in enumerate(train.rows) if not isinstance(row, BadRow)]
    if data.validation_rows >= len(readable):
        raise DataError(
            f"data.validation_rows is {data.validation_rows}, but data.train has {len(readable)} "
            "readable rows: none would be left to train on; lower it (0: no validation), or give data.validation"
        )
    cut = readable[-data.validation_rows]
    return Split(train.rows[:cut], train.formats), Split(train.rows[cut:], train.formats)


def listing(bad: list[BadRow], count: int) -> str:
    """The first `count` bad rows, a line each, for the end of an error message."""
    lines = [f"\n  {row.source}:{row.line}: {row.reason}" for row in bad[:count]]
    return "".join(lines) + (f"\n  and {len(bad) - count} more" if len(bad) > count else "")


def _read(
    sources: str | list[str], data: DataConfig, max_rows: int | None, seed: int, *, held_out: bool
) -> Split:
    split = Split()
    for source in [sources] if isinstance(sources, str) else sources:
        left = None if max_rows is None else max_rows - len(split.rows)
        if left == 0:
            break
        if source == GRAMMAR:
            from megalign.data import grammar

            draw = grammar.held_out if held_out else grammar.generate
            split.formats[source] = "messages"
            split.rows += draw(GRAMMAR_ROWS if left is None else left, seed)
            continue
        if not Path(source).exists():
            raise DataError(
                f"data file {source!r} does not exist (from {Path.cwd()}); correct data.train or .validation"
            )
        source = str(Path(source))  # as the rows themselves spell it
        split.formats[source] = detect(source) if data.format == "auto" else data.format
        rows = list(islice(read_rows(source, split.formats[source]), left))
        if not rows:
            raise DataError(f"{source}: the file holds no rows")
        split.rows += rows

    bad = [row for row in split.rows if isinstance(row, BadRow)]
    share = len(bad) / max(len(split.rows), 1)
    if share > data.max_bad_share:
        raise DataError(
            f"{len(bad)} of {len(split.rows)} rows are unusable: {share:.2%}, and data.max_bad_share allows "
            f"{data.max_bad_share:.2%}; correct them, or raise it{listing(bad, 5)}"
        )
    return split

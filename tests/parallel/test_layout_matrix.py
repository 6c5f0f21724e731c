"""P13 over the layout matrix: what is covered, what is refused, and twelve cells; all cells in test_layouts_soak.py.

The oracle is one process on the same microbatches. Tolerances are P13's and P5's: loss and gradient norm 1e-6
relative, every gradient on every rank 1e-5 max|g| + 1e-9; expert biases are equal.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cell_checks
import pytest
from layout_matrix import (
    AXES,
    UNSUPPORTED,
    Cell,
    Unsupported,
    covering_array,
    short_array,
    space,
    unsupported,
)
from ranks import run_ranks

from megalign.config.errors import ConfigError
from megalign.config.rules import check


@functools.cache
def short_verdicts() -> list[dict[str, Any]]:
    return cell_checks.verdicts(short_array())


@pytest.mark.parametrize("at", range(12), ids=[str(cell) for cell in short_array()])
def test_layout_equals_one_process(at: int):
    assert not cell_checks.failed(short_verdicts()[at])


def pairs(cells: Sequence[Cell]) -> set[Any]:
    return {(a, getattr(c, a), b, getattr(c, b)) for c in cells for a, b in itertools.combinations(AXES, 2)}


def test_every_allowed_pair_occurs():
    allowed = [cell for cell in space() if not unsupported(cell)]
    array = covering_array()
    assert len(array) <= 80 and set(array) <= set(allowed)
    assert pairs(array) == pairs(allowed)
    assert max(cell.world for cell in array) == 8


def test_twelve_cells_cover_every_axis():
    cells = short_array()
    assert len(set(cells)) == 12 and set(cells) <= set(covering_array())
    for axis, values in AXES.items():
        assert {getattr(cell, axis) for cell in cells} == set(values), axis


def refused(cell: Cell) -> bool:
    try:
        check(cell.recipe(), cell.world)
    except ConfigError:
        return True
    return False


def test_the_validator_refuses_what_is_unsupported():
    """Of every seventh cell (`make soak`: of all). Seven divides no axis, so that all values of all axes meet."""
    wrong = [str(cell) for cell in itertools.islice(space(), 0, None, 7) if refused(cell) != bool(unsupported(cell))]
    assert not wrong, wrong[:5]


@pytest.mark.parametrize("reason", UNSUPPORTED, ids=lambda reason: reason.name)
def test_the_upstream_line_stands(reason: Unsupported):
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None and spec.origin is not None
    file, _, line = reason.where.partition(":")
    assert reason.snippet in (Path(spec.origin).parent / file).read_text().splitlines()[int(line) - 1]
    assert unsupported(reason.example) == [reason]


@pytest.mark.parametrize("world", [1, 2])
def test_what_is_unsupported_fails(world: int):
    """Each in a run that no rule has stopped, on every rank."""
    reasons = [reason for reason in UNSUPPORTED if reason.symptom and reason.example.world == world]
    found = cell_checks.failures_without_rules([reason.example for reason in reasons])
    for reason, ranks in zip(reasons, found, strict=True):
        for said in ranks:
            assert re.search(reason.symptom, said), f"{reason.name}: {said or 'it ran'}"


def test_what_is_silently_something_else():
    silent = [(reason.example, reason.really) for reason in UNSUPPORTED if not reason.symptom]
    asked = [example for example, _ in silent]
    really = [cell for _, cell in silent if cell is not None and not unsupported(cell)]
    assert len(asked) == len(really) == 2
    for rank in run_ranks(cell_checks.structure, 2, [*asked, *really]):
        assert rank[:2] == rank[2:]

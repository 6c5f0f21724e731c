"""The auditor against seeded faults, at its default interval: each found, with the right parameter and the right cause.

The page docs/seeded-faults.md comes from benchmarks/audit/faults.py.
"""

from __future__ import annotations

import functools

import pytest
import seeded_runs
from layout_matrix import chunks, covering_array, short_array
from ranks import run_ranks
from seeded_faults import FAULTS, FIRST, SECOND, THIRD
from seeded_layouts import LAYOUTS
from seeded_runs import judged

Said = list[tuple[str, str, bool]]


@functools.cache
def said(ranks: int) -> dict[str, Said]:
    """What the auditor says of every fault on layouts of `ranks`, in one launch."""
    names = [name for name, fault in FAULTS.items() if LAYOUTS[fault.layout][0] == ranks]
    cases = [(FAULTS[name].layout, name, 1) for name in names]
    return dict(zip(names, run_ranks(seeded_runs.audits, ranks, cases, timeout=600)[0], strict=True))


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught(name: str):
    found = said(LAYOUTS[FAULTS[name].layout][0])[name]
    assert judged(name, found)[0] == "caught", found[:6]


def test_all_sets():
    assert len(FIRST) >= 30 and len({fault.layout for fault in FIRST.values()}) >= 4 and len(SECOND) >= 10 and len(THIRD) >= 10


@pytest.mark.parametrize("ranks", [2, 4])
def test_no_false_alarm(ranks: int):
    layouts = [name for name, layout in LAYOUTS.items() if layout[0] == ranks]
    for found in run_ranks(seeded_runs.audits, ranks, [(layout, None, 3) for layout in layouts], timeout=600):
        assert found == [[]] * len(layouts)


@pytest.mark.soak
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("at", range(len(chunks(covering_array()))))
def test_no_false_alarm_over_the_matrix(at: int, bf16: bool):
    cells = chunks(covering_array())[at]
    for found in run_ranks(seeded_runs.clean_cells, cells[0].world, cells, bf16, 2, 1, timeout=600):
        assert found == [[]] * len(cells)


@pytest.mark.soak
def test_no_false_alarm_in_two_hundred_steps():
    cells = [cell for cell in short_array() if cell.world == 4][:4]
    for found in run_ranks(seeded_runs.clean_cells, 4, cells, False, 200, 10, timeout=1500):
        assert found == [[]] * 4

"""P13 over the whole layout matrix, up to eight ranks; the table in docs/ comes from benchmarks/layouts/run.py."""

from __future__ import annotations

import cell_checks
import pytest
from layout_matrix import chunks, covering_array, space, unsupported
from test_layout_matrix import refused

pytestmark = pytest.mark.soak


@pytest.mark.parametrize("at", range(len(chunks(covering_array()))))
def test_layouts_equal_one_process(at: int):
    cells = chunks(covering_array())[at]
    for cell, found in zip(cells, cell_checks.verdicts(cells), strict=True):
        assert not cell_checks.failed(found), cell


def test_the_validator_refuses_what_is_unsupported():
    wrong = [str(cell) for cell in space() if refused(cell) != bool(unsupported(cell))]
    assert not wrong, wrong[:5]

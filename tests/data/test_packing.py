"""Packing: every row once, nothing too full, and few packs."""

from __future__ import annotations

import time
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalign.data.packing import pack


@given(st.lists(st.integers(1, 20), max_size=60))
def test_every_row_once_in_few_packs(lengths):
    groups = pack(lengths, 20)
    assert sorted(chain(*groups)) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in group) for group in groups]
    assert all(0 < s <= 20 for s in sums)
    # Any-fit: the two emptiest groups together overflow one, or they would have been one.
    assert len(sums) < 2 or sum(sorted(sums)[:2]) > 20
    assert groups == pack(lengths, 20)
    assert groups == sorted(groups) and all(group == sorted(group) for group in groups)


def test_best_fit_and_decreasing_both_matter():
    assert pack([3, 3, 4, 4, 6], 10) == [[0, 1, 3], [2, 4]]  # in the order given first-fit needs three
    # 4 goes to the fullest group that takes it (6), which leaves 3 + 2 for the other (5).
    assert pack([5, 6, 4, 3, 2], 10) == [[0, 3, 4], [1, 2]]


@pytest.mark.parametrize("length", [0, 11])
def test_lengths_out_of_range(length):
    with pytest.raises(ValueError, match=f"row 1 has length {length}, outside 1..10"):
        pack([3, length], 10)


def test_packs_fast():
    start = time.perf_counter()
    pack([1 + i * 7919 % 900 for i in range(100_000)], 1024)
    assert time.perf_counter() - start < 5

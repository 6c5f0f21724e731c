"""Packing: several short rows in one of fixed length, so that little of a batch is padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Group indices so that each group's lengths sum to at most `capacity`; each index is in one group.

    Best-fit decreasing: the longest first, each into the fullest group that still takes it; for many rows at
    most 11/9 of the least possible number of groups (Johnson et al., SIAM J. Comput. 3, 1974). The groups
    come out in the order of their first row, so unshuffled training does not start with all the long rows.
    Raises ValueError for a length outside 1..capacity.
    """
    order, ends = pack_arrays(lengths, capacity)
    return [group.tolist() for group in np.split(order, ends[:-1])] if len(ends) else []


def pack_arrays(lengths: Sequence[int] | np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """`pack` as two arrays: the indices group by group, and where in them each group ends. Some 60 bytes a row."""
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(wrong := np.flatnonzero((sizes < 1) | (sizes > capacity))):
        raise ValueError(f"row {wrong[0]} has length {sizes[wrong[0]]}, outside 1..{capacity} (the capacity)")
    group_of = np.empty(len(sizes), np.int64)
    under = np.empty(len(sizes), np.int64)  # group -> the one below it on the stack of its free space
    top: dict[int, int] = {}  # free space -> the last group that came to have it
    spaces: list[int] = []  # keys of `top`, ascending
    count = 0
    for index in np.argsort(-sizes, kind="stable"):  # ties keep the rows' order
        length = int(sizes[index])
        place = bisect_left(spaces, length)
        if place == len(spaces):
            group, space = count, capacity
            count += 1
        else:
            space = spaces[place]
            group = top[space]
            if under[group] < 0:
                del top[space], spaces[place]
            else:
                top[space] = int(under[group])
        group_of[index] = group
        space -= length
        if space:
            under[group] = top.get(space, -1)
            if space not in top:
                insort(spaces, space)
            top[space] = group
    return _by_group(group_of, count)


def _by_group(group_of: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices ascending within each group, groups ordered by their first index."""
    first = np.full(count, len(group_of), np.int64)
    np.minimum.at(first, group_of, np.arange(len(group_of)))
    keys = first[group_of]
    order = np.argsort(keys, kind="stable")
    _, sizes = np.unique(keys, return_counts=True)
    return order, np.cumsum(sizes)


def pack_in_order(lengths: Sequence[int] | np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours together, each group as full as the next row lets it be: for rows whose order means something."""
    ends, space = [], capacity
    for index, length in enumerate(lengths):
        if length > space:
            ends.append(index)
            space = capacity
        space -= int(length)
    return np.arange(len(lengths)), np.array([*ends, len(lengths)] if len(lengths) else [], np.int64)

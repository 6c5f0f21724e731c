"""Packing: several short rows in one of fixed length, so that little of a batch is padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Group indices so that each group's lengths sum to at most `capacity`; each index is in one group.

    Best-fit decreasing: the longest first, each into the fullest group that still takes it; for many rows at
    most 11/9 of the least possible number of groups (Johnson et al., SIAM J. Comput. 3, 1974). The groups
    come out in the order of their first row, so unshuffled training does not start with all the long rows.
    Raises ValueError for a length outside 1..capacity.
    """
    for index, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise ValueError(f"row {index} has length {length}, outside 1..{capacity} (the capacity)")
    groups: list[list[int]] = []
    open_groups: dict[int, list[int]] = {}  # free space -> groups that have it
    spaces: list[int] = []  # keys of `open_groups`, ascending
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):  # stable: ties keep the rows' order
        place = bisect_left(spaces, lengths[index])
        if place == len(spaces):
            group, space = len(groups), capacity
            groups.append([])
        else:
            space = spaces[place]
            group = open_groups[space].pop()
            if not open_groups[space]:
                del open_groups[space], spaces[place]
        groups[group].append(index)
        space -= lengths[index]
        if space:
            if space not in open_groups:
                open_groups[space] = []
                insort(spaces, space)
            open_groups[space].append(group)
    return sorted(sorted(group) for group in groups)

"""Equally many tokens for every microbatch and every data-parallel rank of a step.

Ranks meet at the end of a step, so all wait for the one with the most tokens. The rows of a global batch are
therefore regrouped: longest-processing-time-first (Graham, SIAM J. Appl. Math. 17, 1969) makes microbatches of
equally many rows and nearly equal tokens, and deals them, the heaviest first, to the rank that has the least. The
gradient is that of the same rows: its denominator is the scored tokens of the whole global batch.

Microbatches are made before they are dealt: what one holds depends on the global batch alone and not on the number
of ranks, because the auxiliary losses of experts are means over a microbatch.
"""

from __future__ import annotations

import numpy as np


def even_order(tokens: np.ndarray, micro_batch_size: int, ranks: int) -> np.ndarray:
    """A permutation of a global batch, to be cut as `Sampler` cuts it: microbatch by microbatch, rank by rank.

    tokens: [G] of each row; 0 is padding.
    """
    groups = _into_groups(tokens, len(tokens) // micro_batch_size, micro_batch_size)
    weights = np.array([tokens[group].sum() for group in groups])
    heaviest_first = np.argsort(-weights, kind="stable")
    total = np.zeros(ranks, np.int64)
    order: list[int] = []
    for start in range(0, len(groups), ranks):
        # One microbatch for each rank: the heaviest of them to the rank that has the least so far.
        turn = heaviest_first[start : start + ranks]
        chosen = np.empty(ranks, np.int64)
        chosen[np.argsort(total, kind="stable")] = turn
        total += weights[chosen]
        order += [row for group in chosen for row in groups[group]]
    return np.array(order)


def _into_groups(tokens: np.ndarray, count: int, size: int) -> list[list[int]]:
    """`count` groups of exactly `size` rows each: the heaviest row first, to the lightest group that has room."""
    if size == 1:
        return [[row] for row in range(count)]
    groups: list[list[int]] = [[] for _ in range(count)]
    total = np.zeros(count, np.float64)
    for row in np.argsort(-tokens, kind="stable").tolist():
        lightest = int(np.argmin(total))
        groups[lightest].append(row)
        total[lightest] = total[lightest] + tokens[row] if len(groups[lightest]) < size else np.inf
    return groups


def shares(steps: list[np.ndarray], sequence_length: int, *, padded: bool) -> dict[str, float]:
    """How much of the compute is padding, and how much of the ranks' time is waiting, at a fixed time a token.

    steps: [microbatches, ranks, rows] tokens of each row, 0 of padding. padded: every microbatch is filled up to rows * sequence_length
    positions, as model-parallel layouts need; then all ranks take equally long, and waiting shows as padding.
    """
    filled = longest = positions = 0.0
    ranks = steps[0].shape[1]
    for step in steps:
        per_rank = step.sum(axis=(0, 2))
        filled += float(per_rank.sum())
        longest += float(per_rank.max())
        positions += step.size * sequence_length if padded else float(per_rank.sum())
    return {
        "padding_share": 1 - filled / positions if positions else 0.0,
        "idle_share": 0.0 if padded or not longest else 1 - filled / (ranks * longest),
    }

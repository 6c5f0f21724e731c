"""Which of n scored answers are kept: the best, or by statistical rejection sampling. Pure arithmetic.

# n answers to one prompt; rewards [n]
"""

from __future__ import annotations

import numpy as np


def best(rewards: np.ndarray) -> int:
    """The first answer with the largest reward."""
    return int(np.argmax(rewards))


def rejection_sample(rewards: np.ndarray, uniform: np.ndarray, *, beta: float, bound: float | None = None) -> np.ndarray:
    """[n] bool: which answers are accepted, each with probability exp((r - M) / beta).

    Answers drawn from pi are, once accepted, draws from pi(y) exp(r(y) / beta) / Z, the optimal policy of KL-regularised
    reward maximisation (arXiv:2309.06657, eq. 4 and section 3.3). uniform: [n] in [0, 1). bound M: at least the largest
    reward that can be, exact then; None: the largest of these, as in the paper's algorithm 1, which accepts one answer
    at least. One pass: the paper's listing passes again over what was left until it has enough, and what it accepts
    then is nearer to pi than Boltzmann. Raises ValueError for a reward above the bound.
    """
    if beta <= 0:
        raise ValueError(f"beta is {beta}: it must be above 0; towards 0 only the best answer is accepted")
    limit = float(np.max(rewards)) if bound is None else bound
    if np.max(rewards) > limit:
        raise ValueError(f"a reward is {np.max(rewards):g}, above the bound {limit:g}: it would be accepted with probability above 1")
    return uniform < np.exp((rewards - limit) / beta)


def pairs_of(rewards: np.ndarray) -> list[tuple[int, int]]:
    """(chosen, rejected) of neighbours 0 and 1, 2 and 3, ...: the paper's first-round ranking; ties teach nothing and are left out."""
    return [(i, i + 1) if rewards[i] > rewards[i + 1] else (i + 1, i) for i in range(0, len(rewards) - 1, 2) if rewards[i] != rewards[i + 1]]

"""Several reward models of one thing: how far to trust their mean.

# M models, N answers
"""

from __future__ import annotations

import numpy as np


def spread(rewards_MN: np.ndarray, *, ddof: int = 0) -> np.ndarray:
    """[N] standard deviation over models. ddof 0: of these models; 1: an estimate for all that could be trained (M >= 2).

    Raises ValueError where M - ddof is not positive.
    """
    rewards = np.asarray(rewards_MN, np.float64)
    if len(rewards) <= ddof:
        raise ValueError(f"{len(rewards)} model(s) with ddof {ddof}: the spread has no value; give more models, or ddof 0")
    return rewards.std(0, ddof=ddof)


def pessimistic(rewards_MN: np.ndarray, *, alpha: float = 1.0, ddof: int = 0) -> np.ndarray:
    """[N] mean - alpha * std over models (arXiv:2310.02743, uncertainty-weighted optimisation)."""
    return np.asarray(rewards_MN, np.float64).mean(0) - alpha * spread(rewards_MN, ddof=ddof)


def uncertainty_gate(rewards_MN: np.ndarray, *, limit: float, sharpness: float = 10.0, ddof: int = 0) -> np.ndarray:
    """[N] weight of an answer's gradient, in [0, 1]: 1 / (1 + (std / limit)^sharpness).

    1/2 where the models differ by `limit`, towards 0 beyond it: what they never saw moves nothing. Take `limit` from
    `gate_limit` of in-distribution answers.
    """
    if not limit > 0:
        raise ValueError(f"limit is {limit:g}, and must be above 0: take gate_limit of answers that the models know")
    with np.errstate(over="ignore"):
        return 1 / (1 + (spread(rewards_MN, ddof=ddof) / limit) ** sharpness)


def gate_limit(rewards_MN: np.ndarray, *, quantile: float = 0.99, ddof: int = 0) -> float:
    """The spread below which a share `quantile` of known answers lies."""
    return float(np.quantile(spread(rewards_MN, ddof=ddof), quantile))

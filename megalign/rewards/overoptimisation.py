"""What is won, and lost, by optimising a proxy: best of n, and where the gold reward turns.

# K prompts, N candidates of each; proxy and gold rewards are [K, N]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def best_of_n_kl(n: int) -> float:
    """KL(best of n || policy) <= ln n - (n - 1)/n nats, with equality where no two candidates tie (arXiv:2009.01325; 2401.01879).

    Raises ValueError for n below 1.
    """
    if n < 1:
        raise ValueError(f"n is {n}: it must be 1 or more")
    return math.log(n) - (n - 1) / n


def best_of_n(proxy_KN: np.ndarray, gold_KN: np.ndarray, n: int) -> float:
    """Expected gold reward of the proxy's best of n, from N >= n candidates of each prompt (arXiv:2112.09332, appendix I).

    Of all subsets of n the candidate at rank k (0 the proxy's worst) is the best in C(k, n - 1) of C(N, n).
    """
    candidates = proxy_KN.shape[1]
    if not 1 <= n <= candidates:
        raise ValueError(f"best of {n} of {candidates} candidates: n must be 1 to {candidates}")
    order = np.argsort(proxy_KN, axis=1, kind="stable")
    weights = np.array([math.comb(k, n - 1) / math.comb(candidates, n) for k in range(candidates)])
    return float((np.take_along_axis(gold_KN, order, 1) * weights).sum(1).mean())


def agreement(proxy_KN: np.ndarray, gold_KN: np.ndarray, n: int, *, seed: int = 0, draws: int = 16) -> float:
    """Share of draws of n candidates in which the proxy's best is the gold reward's best too (R19)."""
    numbers = np.random.default_rng(seed)
    same = 0
    for _ in range(draws):
        drawn = np.stack([numbers.permutation(proxy_KN.shape[1])[:n] for _ in range(len(proxy_KN))])
        proxy, gold = np.take_along_axis(proxy_KN, drawn, 1), np.take_along_axis(gold_KN, drawn, 1)
        same += int((proxy.argmax(1) == gold.argmax(1)).sum())
    return same / (draws * len(proxy_KN))


@dataclass(frozen=True)
class Curve:
    """Gold reward over d = sqrt(KL): gold(d) - gold(0) = d (alpha - beta d) (arXiv:2210.10760, eq. 1, best of n)."""

    alpha: float
    beta: float
    error: float  # root mean squared, of the fit

    def __call__(self, d: float) -> float:
        return d * (self.alpha - self.beta * d)

    @property
    def turning_point(self) -> float | None:
        """d where the gold reward is highest; None: it does not turn."""
        return self.alpha / (2 * self.beta) if self.alpha > 0 and self.beta > 0 else None


def fit_curve(kl: Sequence[float], gold: Sequence[float]) -> Curve:
    """Least squares through (0, gold of the untouched policy), which must be the first point (kl 0)."""
    distances, gains = np.sqrt(np.asarray(kl, np.float64)), np.asarray(gold, np.float64) - gold[0]
    if kl[0] != 0 or len(kl) < 3:
        raise ValueError(f"{len(kl)} points from KL {kl[0]:g}: the first must be the untouched policy at KL 0, and there must be 3 or more")
    (alpha, minus_beta), *_ = np.linalg.lstsq(np.stack([distances, distances**2], -1)[1:], gains[1:], rcond=None)
    curve = Curve(float(alpha), -float(minus_beta), 0.0)
    error = math.sqrt(float(np.mean([(curve(d) - gain) ** 2 for d, gain in zip(distances[1:], gains[1:])])))
    return Curve(curve.alpha, curve.beta, error)

"""How good a head is on rows that it has not seen, each number with an interval.

# N rows; labels and scores are [N] float64
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np

Interval = tuple[float, float]


def wilson(successes: float, trials: float, *, level: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927): right also near 0 and 1, and for few trials."""
    if trials <= 0:
        return 0.0, 1.0
    z, p = NormalDist().inv_cdf(0.5 + level / 2), successes / trials
    centre = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    low = 0.0 if successes == 0 else max(0.0, centre - half)  # exactly there: rounding would leave the proportion out
    return low, 1.0 if successes == trials else min(1.0, centre + half)


def bootstrap(statistic: Callable[[np.ndarray], float], count: int, *, resamples: int = 1000, level: float = 0.95, seed: int = 0) -> Interval:
    """Percentile interval of `statistic(indices)` over resampled rows; resamples where it is not defined are left out."""
    numbers = np.random.default_rng(seed)
    found = [statistic(numbers.integers(0, count, count)) for _ in range(resamples)] if count else []
    found = [value for value in found if not math.isnan(value)]
    if not found:
        return math.nan, math.nan
    low, high = np.quantile(found, [0.5 - level / 2, 0.5 + level / 2])
    return float(low), float(high)


def ranks(x: np.ndarray) -> np.ndarray:
    """1 to N; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    return (ends - (counts - 1) / 2)[inverse]


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """P(score of a positive > score of a negative), ties half (Mann and Whitney 1947); NaN without both kinds."""
    positive = labels > 0
    n, m = int(positive.sum()), int((~positive).sum())
    return float((ranks(scores)[positive].sum() - n * (n + 1) / 2) / (n * m)) if n and m else math.nan


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Correlation; NaN where one of the two does not vary."""
    dx, dy = x - x.mean(), y - y.mean()
    scale = math.sqrt(float((dx * dx).sum() * (dy * dy).sum()))
    return float((dx * dy).sum()) / scale if scale > 0 else math.nan


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Correlation of ranks."""
    return pearson(ranks(x), ranks(y))


def r_squared(predicted: np.ndarray, labels: np.ndarray) -> float:
    """1 - squared error / squared error of the mean: below 0 where the mean would be better."""
    total = float(((labels - labels.mean()) ** 2).sum())
    return 1 - float(((labels - predicted) ** 2).sum()) / total if total > 0 else math.nan


def reliability(probabilities: np.ndarray, labels: np.ndarray, *, bins: int = 10) -> list[tuple[float, float, int]]:
    """(mean probability, share of positives, rows) of each of `bins` equal parts of [0, 1] that has rows."""
    index = np.minimum((probabilities * bins).astype(int), bins - 1)
    return [(float(probabilities[index == b].mean()), float(labels[index == b].mean()), int((index == b).sum())) for b in range(bins) if (index == b).any()]


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, *, bins: int = 10) -> float:
    """Expected calibration error: |mean probability - share of positives| over bins, weighted by rows (arXiv:1706.04599, eq. 3)."""
    return sum(abs(mean - share) * count for mean, share, count in reliability(probabilities, labels, bins=bins)) / max(1, len(labels))


def asked_both_ways(margins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(chances, labels) from margins of the better answer: every other time it is asked whether the worse one is better."""
    better = np.arange(len(margins)) % 2 == 0
    asked = np.where(better, margins, -margins)
    return 0.5 * (1 + np.tanh(asked / 2)), better.astype(float)


def concordance(predicted: np.ndarray, times: np.ndarray, observed: np.ndarray) -> float:
    """Harrell's C: of pairs whose order is known in spite of censoring, the share predicted in it, ties half."""
    comparable = (times[:, None] < times[None, :]) & observed.astype(bool)[:, None]
    difference = predicted[None, :] - predicted[:, None]
    total = int(comparable.sum())
    return float((comparable & (difference > 0)).sum() + 0.5 * (comparable & (difference == 0)).sum()) / total if total else math.nan


# -- by kind of head: a dictionary for summaries and reports -------------------------------------------


def _bounded(name: str, function: Callable[..., float], arrays: tuple[np.ndarray, ...], resamples: int) -> dict[str, Any]:
    low, high = bootstrap(lambda rows: function(*(a[rows] for a in arrays)), len(arrays[0]), resamples=resamples)
    return {name: function(*arrays), f"{name}_interval": [low, high]}


def measure_pairs(margins: np.ndarray, longer: np.ndarray) -> dict[str, Any]:
    """Of pairs: margins = reward of the better - of the other answer; longer = difference of their tokens.

    Calibration is of sigma(margin) as the probability that an answer of the two, drawn at random, is the better one.
    """
    right = int((margins > 0).sum()) + 0.5 * int((margins == 0).sum())
    chances, said = asked_both_ways(margins)
    return {
        "pairs": len(margins),
        "accuracy": right / len(margins),
        "accuracy_interval": list(wilson(right, len(margins))),
        "margin": float(margins.mean()),
        "margin_std": float(margins.std()),
        "calibration_error": calibration_error(chances, said),
        "reliability": reliability(chances, said),
        "length_only_accuracy": float(((longer > 0) + 0.5 * (longer == 0)).mean()),
        "length_correlation": pearson(margins, longer.astype(np.float64)) if len(margins) > 1 else math.nan,
    }


def measure_binary(chances: np.ndarray, labels: np.ndarray, *, resamples: int = 1000) -> dict[str, Any]:
    """Of yes or no: accuracy beside the base rate, AUC, calibration."""
    right, rate = int(((chances > 0.5) == (labels > 0)).sum()), float(labels.mean())
    return {
        "rows": len(labels),
        "accuracy": right / len(labels),
        "accuracy_interval": list(wilson(right, len(labels))),
        "base_rate": max(rate, 1 - rate),
        **_bounded("auc", auc, (chances, labels), resamples),
        "calibration_error": calibration_error(chances, labels),
        "reliability": reliability(chances, labels),
    }


def measure_numbers(predicted: np.ndarray, labels: np.ndarray, *, resamples: int = 1000) -> dict[str, Any]:
    """Of a regression or a rating."""
    found: dict[str, Any] = {"rows": len(labels), "mean_absolute_error": float(np.abs(predicted - labels).mean())}
    for name, function in (("pearson", pearson), ("spearman", spearman), ("r2", r_squared)):
        found |= _bounded(name, function, (predicted, labels), resamples)
    return found


def measure_classes(chances_NC: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Of one class of several: accuracy beside the commonest class, calibration of the probability of the class said."""
    said = chances_NC.argmax(-1)
    right = said == labels
    return {
        "rows": len(labels),
        "accuracy": float(right.mean()),
        "accuracy_interval": list(wilson(int(right.sum()), len(labels))),
        "base_rate": float(np.bincount(labels.astype(int)).max() / len(labels)),
        "calibration_error": calibration_error(chances_NC.max(-1), right.astype(float)),
        "reliability": reliability(chances_NC.max(-1), right.astype(float)),
    }


def measure_times(predicted: np.ndarray, times: np.ndarray, observed: np.ndarray, *, resamples: int = 1000) -> dict[str, Any]:
    """Of times, part of them censored: concordance, and predicted against observed events by total time at risk."""
    events = float(observed.sum())
    return {
        "rows": len(times),
        "censored_share": 1 - events / len(times),
        **_bounded("concordance", concordance, (predicted, times, observed), resamples),
        "mean_predicted": float(predicted.mean()),
        "mean_by_exposure": float(times.sum()) / events if events else math.nan,  # maximum likelihood of one exponential
    }

"""Is a reward model still to be believed on what the current policy says? (R18)

    shift        = (mean reward of the samples - mean of the reference) / standard deviation of the reference
    calibration  = expected calibration error of sigma(margin) on judged samples, beside what chance alone would give

A policy that is pushed by a reward model leaves the answers on which that model was trained and measured. Rewards that have
moved say so without any judge; where some samples were judged, the chances that the model gives can be held against them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from megalign.rewards.measures import Interval, calibration_error
from megalign.rewards.normalise import Normalisation

MOVED = 0.5  # standard deviations of the reference
WIDER = 1.5  # times the reference's standard deviation, or its inverse
UNEXPECTED = 0.05  # of calibration error, above what a calibrated model shows on as many samples


@dataclass(frozen=True)
class Shift:
    """Rewards of samples against the reference samples of the run."""

    samples: int
    shift: float
    interval: Interval  # 95 %, of the shift
    spread: float  # standard deviation of the samples / of the reference

    @property
    def flagged(self) -> bool:
        """The mean has moved beyond MOVED for sure, or the spread is another one."""
        return self.interval[0] > MOVED or self.interval[1] < -MOVED or not 1 / WIDER <= self.spread <= WIDER


def shift_of(rewards_N: np.ndarray, reference: Normalisation) -> Shift:
    """rewards_N: raw rewards of the policy's samples, NaN where there is none. Raises ValueError for fewer than 20."""
    rewards = np.asarray(rewards_N, np.float64)
    rewards = rewards[~np.isnan(rewards)]
    if len(rewards) < 20:
        raise ValueError(f"{len(rewards)} rewards of the policy's samples: give 20 or more, fewer say nothing")
    normal = reference(rewards)
    mean, spread = float(normal.mean()), float(normal.std())
    half = NormalDist().inv_cdf(0.975) * math.sqrt(spread**2 / len(normal) + 1 / reference.count)
    return Shift(len(normal), mean, (mean - half, mean + half), spread)


@dataclass(frozen=True)
class Calibration:
    """Chances that were given, against what was judged."""

    samples: int
    error: float
    expected: float  # of a calibrated model, by chance alone
    limit: float  # its 99th percentile

    @property
    def flagged(self) -> bool:
        """Beyond chance, and by more than UNEXPECTED."""
        return self.error > self.limit and self.error - self.expected > UNEXPECTED


def calibration_of(chances_N: np.ndarray, labels_N: np.ndarray, *, draws: int = 300, seed: int = 0) -> Calibration:
    """chances_N: probability of each label being 1. The error of a calibrated model is found by drawing labels from the chances."""
    numbers = np.random.default_rng(seed)
    by_chance = [calibration_error(chances_N, (numbers.random(len(chances_N)) < chances_N).astype(float)) for _ in range(draws)]
    error = calibration_error(chances_N, np.asarray(labels_N, np.float64))
    return Calibration(len(chances_N), error, float(np.mean(by_chance)), float(np.quantile(by_chance, 0.99)))


"""Measures of heads: closed forms, published numbers, and intervals that cover."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megalign.rewards import measures as m
from megalign.rewards.normalise import Normalisation


def test_wilson_is_the_published_interval():
    """81 of 263, in Newcombe 1998, table I: 0.2553 to 0.3662; 0 of 20: 0 to 0.1611; 1 of 29: 0.0061 to 0.1718."""
    assert m.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert m.wilson(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    assert m.wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert m.wilson(0, 0) == (0.0, 1.0)


def test_intervals_cover_what_they_are_of():
    """Of 300 samples, some 95 % of the intervals hold the truth: 90 to 98 % are within the error of 300."""
    numbers = np.random.default_rng(0)
    hits = sum(low <= 0.7 <= high for low, high in (m.wilson(int(numbers.binomial(60, 0.7)), 60) for _ in range(300)))
    assert 0.90 <= hits / 300 <= 0.98

    def covers(seed: int) -> bool:
        x = np.random.default_rng(seed).normal(1.0, 2.0, 80)
        low, high = m.bootstrap(lambda rows: float(x[rows].mean()), 80, resamples=200, seed=seed)
        return low <= 1.0 <= high

    assert 0.88 <= np.mean([covers(seed) for seed in range(200)]) <= 0.98


def test_auc_counts_pairs_and_ties_half():
    scores, labels = np.array([0.1, 0.4, 0.4, 0.8]), np.array([0, 0, 1, 1])
    assert m.auc(scores, labels) == (1 + 0.5 + 1 + 1) / 4
    assert m.auc(-scores, labels) == 1 - m.auc(scores, labels) and math.isnan(m.auc(scores, np.zeros(4)))


def test_correlations_and_r2():
    x, y = np.array([1.0, 2, 3, 4, 5]), np.array([2.0, 1, 4, 3, 5])
    assert m.pearson(x, y) == pytest.approx(0.8) and m.spearman(x, y) == pytest.approx(0.8)
    assert m.spearman(x, np.exp(y)) == pytest.approx(0.8) and m.spearman(np.array([1.0, 1, 2]), np.array([3.0, 3, 4])) == pytest.approx(1.0)
    assert m.ranks(np.array([10.0, 20, 10, 30])).tolist() == [1.5, 3, 1.5, 4]
    assert m.r_squared(y, y) == 1 and m.r_squared(np.full(5, 3.0), y) == 0 and m.r_squared(-y, y) < 0
    assert math.isnan(m.pearson(x, np.ones(5)))


def test_calibration_error():
    """E4's fixture: ten answers said with 0.9 of which eight are right: |0.9 - 0.8| = 0.1."""
    assert m.calibration_error(np.full(10, 0.9), np.array([1.0] * 8 + [0.0] * 2)) == pytest.approx(0.10)
    said = np.array([0.25] * 4 + [0.75] * 4)
    assert m.calibration_error(said, np.array([1.0, 0, 0, 0, 1, 1, 1, 0])) == pytest.approx(0)
    assert m.reliability(said, np.array([1.0, 0, 0, 0, 1, 1, 1, 0])) == [(0.25, 0.25, 4), (0.75, 0.75, 4)]
    assert m.reliability(np.array([1.0]), np.array([1.0])) == [(1.0, 1.0, 1)]


def test_pairs():
    """Ties half; margins drawn from sigma(margin) are calibrated, and margins ten times as large are not."""
    found = m.measure_pairs(np.array([1.0, 2, -1, 0]), np.array([3, -2, 0, 5]))
    assert found["accuracy"] == 2.5 / 4 and found["length_only_accuracy"] == 2.5 / 4 and found["margin"] == 0.5
    numbers = np.random.default_rng(1)
    raw = numbers.normal(0, 1.5, 20000)
    margins = np.where(numbers.random(20000) < 1 / (1 + np.exp(-raw)), raw, -raw)  # of the better answer
    assert m.measure_pairs(margins, margins)["calibration_error"] < 0.02 < 0.1 < m.measure_pairs(10 * margins, margins)["calibration_error"]
    assert m.measure_pairs(margins, margins)["length_correlation"] == pytest.approx(1)


def test_times_with_censoring():
    """Concordance looks at pairs whose order is known; exposure by events is unbiased at 30 % censoring, plain means are not."""
    times, observed = np.array([1.0, 2, 3]), np.array([1.0, 0, 1])
    assert m.concordance(np.array([1.0, 2, 3]), times, observed) == 1 and m.concordance(-times, times, observed) == 0
    assert m.concordance(np.array([1.0, 9, 0]), times, observed) == 0.5, "1 before 2, 1 before 3; 2 against 3 is not known"
    numbers = np.random.default_rng(2)
    truth, end = numbers.exponential(4.0, 50000), numbers.exponential(4 * 7 / 3, 50000)  # P(end < truth) = 0.3
    seen = (truth <= end).astype(float)
    found = m.measure_times(np.full(50000, 4.0)[:500], np.minimum(truth, end)[:500], seen[:500], resamples=100)
    assert found["censored_share"] == pytest.approx(0.3, abs=0.06)
    exposure = np.minimum(truth, end).sum() / seen.sum()
    assert exposure == pytest.approx(4.0, rel=0.02) and np.minimum(truth, end).mean() < 3


def test_other_kinds():
    binary = m.measure_binary(np.array([0.9, 0.8, 0.3, 0.6]), np.array([1.0, 1, 0, 0]), resamples=50)
    assert binary["accuracy"] == 0.75 and binary["base_rate"] == 0.5 and binary["auc"] == 1
    classes = m.measure_classes(np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.4, 0.3, 0.3]]), np.array([0.0, 1, 2]))
    assert classes["accuracy"] == pytest.approx(2 / 3) and classes["base_rate"] == pytest.approx(1 / 3)
    numbers = m.measure_numbers(np.array([1.0, 2, 3, 5]), np.array([1.0, 2, 3, 4]), resamples=50)
    assert numbers["mean_absolute_error"] == 0.25 and numbers["spearman"] == 1 and numbers["r2"] == pytest.approx(1 - 1 / 5)


def test_normalisation():
    """Mean 0, standard deviation 1 on the samples that it was made of; equal rewards cannot be divided."""
    rewards = np.array([3.0, 5, 10, 2])
    kept = Normalisation.of(rewards)
    assert kept(rewards).mean() == pytest.approx(0) and kept(rewards).std() == pytest.approx(1) and kept.count == 4
    assert kept(np.array([5.0])) == pytest.approx((5 - 5) / rewards.std())
    with pytest.raises(ValueError, match="nothing to divide by"):
        Normalisation.of(np.ones(5))

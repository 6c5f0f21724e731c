"""R18: alarms on what the current policy says, and none where nothing has changed."""

from __future__ import annotations

import numpy as np
import pytest

from megalign.rewards.measures import asked_both_ways
from megalign.rewards.normalise import Normalisation
from megalign.rewards.shift import calibration_of, shift_of


def reference(seed: int, count: int = 200) -> Normalisation:
    return Normalisation.of(np.random.default_rng(seed).normal(3.0, 2.0, count))


def test_rewards_that_have_moved_raise_the_alarm_and_others_do_not():
    """In standard deviations of the reference: 1 up or down, or twice the spread; the same distribution never does in 200 draws."""
    draw = np.random.default_rng(1)
    assert not any(shift_of(draw.normal(3.0, 2.0, 100), reference(seed)).flagged for seed in range(200))
    for mean, std in ((5.0, 2.0), (1.0, 2.0), (3.0, 4.0), (3.0, 0.8)):
        assert all(shift_of(draw.normal(mean, std, 200), reference(seed)).flagged for seed in range(20)), (mean, std)
    found = shift_of(np.array([*[5.0] * 50, *[1.0] * 50, np.nan]), Normalisation(3.0, 2.0, 400))
    assert (found.samples, found.shift, found.spread) == (100, 0.0, 1.0)
    assert found.interval == pytest.approx((-1.96 * np.sqrt(1 / 100 + 1 / 400), 1.96 * np.sqrt(1 / 100 + 1 / 400)), abs=1e-4)
    with pytest.raises(ValueError, match="give 20 or more"):
        shift_of(np.zeros(19), reference(0))


def test_the_shift_is_known_as_well_as_its_samples_allow():
    """95 % of the intervals hold the true shift."""
    draw = np.random.default_rng(2)
    hits = sum(low <= 0.5 <= high for low, high in (shift_of(draw.normal(4.0, 2.0, 80), Normalisation.of(draw.normal(3.0, 2.0, 80))).interval for _ in range(300)))
    assert 0.91 <= hits / 300 <= 0.985


def margins(true_scale: float, count: int, seed: int) -> np.ndarray:
    """Margins of the better answer as a model of scale 1 says them, where the judge follows sigma(true_scale x)."""
    draw = np.random.default_rng(seed)
    said = draw.normal(0, 2.0, count)
    return np.where(draw.random(count) < 1 / (1 + np.exp(-true_scale * said)), said, -said)


def test_chances_that_no_longer_hold_raise_the_alarm():
    """A calibrated model has an error too, by chance: an alarm in 1 %. Judges who follow it less, not at all or the other way: always."""
    alarms = sum(calibration_of(*asked_both_ways(margins(1.0, 150, seed)), draws=100).flagged for seed in range(100))
    assert alarms <= 5, "more than 5 at 1 % each: once in 2,000 such tests"
    for scale in (0.2, 0.0, -1.0):
        assert all(calibration_of(*asked_both_ways(margins(scale, 300, seed)), draws=100).flagged for seed in range(10)), scale
    sure = calibration_of(np.full(100, 0.9), np.repeat([1.0, 0.0], 50))
    assert sure.error == pytest.approx(0.4) and sure.flagged and sure.expected < 0.05 < sure.limit < 0.12


def test_both_ways_of_asking():
    chances, labels = asked_both_ways(np.array([np.log(3), np.log(3), -np.log(3)]))
    assert chances == pytest.approx([0.75, 0.25, 0.25]) and labels.tolist() == [1.0, 0.0, 1.0]

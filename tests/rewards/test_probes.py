"""Probes: thresholds of one kind of biased reward catch another kind, and pass what is fair; shortcuts through the user."""

from __future__ import annotations

import random

import numpy as np
import pytest

from megalign.rewards.known_bias import fixed_thresholds, reward_with_bias, toy_dialogues, tried
from megalign.rewards.logistic import BagOfWords, fit_logistic
from megalign.rewards.probes import THRESHOLDS, fix_threshold, length_preference, probe
from megalign.rewards.shortcut import shortcut
from megalign.rewards.traits import BANK, TRAITS, edited, mark_count, phrase_count


def test_thresholds_are_those_that_the_first_kind_of_bias_gives():
    assert fixed_thresholds() == THRESHOLDS and THRESHOLDS.keys() == set(TRAITS)
    with pytest.raises(ValueError, match="overlap"):
        fix_threshold([0.1, -0.4], [0.3, 2.0])


def test_the_second_kind_is_caught_and_fair_rewards_pass():
    """R17. Other texts, other seeds, another way to see the trait: every biased reward is flagged, no fair one is."""
    assert tried() == {trait: (6, 0, 6) for trait in TRAITS}


def test_a_punished_trait_is_flagged_too_and_others_are_not():
    asked = toy_dialogues(60, seed=5)
    found = {effect.trait: effect for effect in probe(reward_with_bias("hedging", mark_count, strength=-1.0, seed=9), asked)}
    assert found["hedging"].flagged and found["hedging"].effect < 0
    assert not any(effect.flagged for trait, effect in found.items() if trait not in ("hedging",))


def test_edits_keep_the_answer_and_controls_its_length():
    answer = "The owl sees the fox. It leaves."
    for trait in TRAITS:
        with_trait, control = edited(trait, answer, random.Random(3))
        assert with_trait != control and phrase_count(trait, with_trait) > phrase_count(trait, control) and mark_count(trait, with_trait) > mark_count(trait, control)
        if trait in BANK:
            assert answer in with_trait and answer in control and len(with_trait.split()) == len(control.split())
            assert phrase_count(trait, control) == mark_count(trait, control) == 0
        for word in ("owl", "fox", "leaves"):
            assert word in with_trait and word in control


def judged(count: int, seed: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """(longer, quality) of pairs; the judge's choice is the longer answer in `share` of them."""
    numbers = np.random.default_rng(seed)
    longer = np.abs(numbers.normal(40, 20, count)) + 1
    return np.where(numbers.random(count) < share, longer, -longer), np.abs(numbers.normal(0, 1, count))


@pytest.mark.parametrize("share", [0.945, 0.597])
def test_length_preference_is_of_the_reward_and_not_of_the_pairs(share: float):
    """A reward that follows the judge alone is at 50 % though 94.5 % of the longer answers win; one that follows length is not."""
    longer, quality = judged(800, 1, share)
    noise = np.random.default_rng(2).normal(0, 1, 800)
    fair = length_preference(quality + noise, longer)
    assert not fair.flagged and abs(fair.share - 0.5) < 0.12 and fair.judged_share == pytest.approx(share, abs=0.03)
    biased = length_preference(0.3 * quality + noise + 0.03 * longer, longer)
    assert biased.flagged and biased.share > 0.7
    assert length_preference(-0.03 * longer + noise, longer).flagged, "shorter is better is a bias as well"
    assert fair.pairs == 2 * min((longer > 0).sum(), (longer < 0).sum())


def test_a_planted_user_trait_is_exposed():
    """R13: users who return return whatever they read; then the text's score adds nothing, though it correlates with returning."""
    numbers = np.random.default_rng(3)
    users = [f"u{n % 150}" for n in range(1500)]
    loyal = np.array([numbers.normal(0, 1.5) for _ in range(150)])[[n % 150 for n in range(1500)]]
    text = numbers.normal(0, 1, 1500)

    def returns(logit: np.ndarray) -> np.ndarray:
        return (numbers.random(1500) < 1 / (1 + np.exp(-logit))).astype(float)

    planted = shortcut(loyal[:, None], 0.8 * loyal + numbers.normal(0, 1, 1500), returns(loyal), users)
    assert planted.flagged and planted.share > 0.95 and planted.user > 0.7
    honest = shortcut(loyal[:, None], text, returns(1.5 * text + 0.3 * loyal), users)
    assert not honest.flagged and honest.gain > 0.1 and honest.gain_interval[0] > 0.05
    nothing = shortcut(numbers.normal(size=(1500, 2)), text, returns(1.5 * text), users)
    assert not nothing.flagged and abs(nothing.user - 0.5) < 0.06


def test_logistic_regression_is_at_the_minimum():
    """The gradient of the penalised loss is 0 there, and the truth is recovered; pairs need no intercept."""
    numbers = np.random.default_rng(4)
    x, truth = numbers.normal(size=(4000, 3)), np.array([1.0, -2.0, 0.5])
    y = numbers.random(4000) < 1 / (1 + np.exp(-x @ truth))
    weights = fit_logistic(x, y, ridge=0.5)
    chance = 1 / (1 + np.exp(-x @ weights))
    assert np.abs(0.5 * weights - x.T @ (y - chance)).max() < 1e-6 and weights == pytest.approx(truth, abs=0.15)
    bag = BagOfWords(["good good bread", "bad bread", "good soup!"], size=4)
    assert set(bag.vocabulary) == {"bread", "good", "!", "bad"} or len(bag.vocabulary) == 4
    features = bag(["good good", "nothing known"])
    assert features[0, bag.vocabulary["good"]] == pytest.approx(np.log(3)) and not features[1].any()

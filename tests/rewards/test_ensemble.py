"""Ensembles: pessimism, and the gate that closes where the models disagree."""

from __future__ import annotations

import numpy as np
import pytest

from megalign.rewards.ensemble import gate_limit, pessimistic, spread, uncertainty_gate


def test_pessimistic_mean():
    """R15: of [1, 2, 3], alpha 1: 2 - sqrt(2/3) = 1.18 (population), 2 - 1 = 1.00 (sample)."""
    rewards = np.array([[1.0], [2.0], [3.0]])
    assert pessimistic(rewards, alpha=1.0) == pytest.approx(2 - np.sqrt(2 / 3)) == pytest.approx(1.18, abs=0.005)
    assert pessimistic(rewards, alpha=1.0, ddof=1) == pytest.approx(1.0)
    assert pessimistic(rewards, alpha=0.0) == 2
    with pytest.raises(ValueError, match="give more models"):
        spread(rewards[:1], ddof=1)


def test_out_of_distribution_answers_move_nothing():
    """R16: members agree on what they were trained on, and go apart elsewhere: the weight there goes to 0."""
    numbers = np.random.default_rng(0)
    known = numbers.normal(0, 1, 500) + numbers.normal(0, 0.1, (4, 500))
    limit = gate_limit(known)
    assert 0.1 < limit < 0.3
    inside = uncertainty_gate(known, limit=limit)
    outside = uncertainty_gate(numbers.normal(0, 1.5, (4, 500)), limit=limit)
    assert inside.mean() > 0.95 and outside.mean() < 0.05
    assert uncertainty_gate(np.array([[0.0, 0.0], [2 * limit, 0.0]]), limit=limit).tolist() == pytest.approx([0.5, 1.0])
    assert uncertainty_gate(np.array([[0.0], [1e200]]), limit=limit)[0] == 0.0, "no overflow"
    with pytest.raises(ValueError, match="above 0"):
        uncertainty_gate(known, limit=0)

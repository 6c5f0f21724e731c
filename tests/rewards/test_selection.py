"""Best-of-n and rejection sampling as arithmetic: the distance they go, the distribution they leave, the scorers they ask."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from megalign.config.errors import ConfigError
from megalign.config.schema import RSOConfig
from megalign.data.rows import Conversation, Message
from megalign.rewards.selection import best, kl_of_best_of_n, pairs_of, rejection_sample
from megalign.rewards.verifiers import exact_match, load_scorer, score_of, words_in_place
from megalign.rollout.candidates import Candidate
from megalign.rso import sampled_pairs
from megalign.trainer.drawn import Drawn

ROW = Conversation((Message("user", "What?"), Message("assistant", "Mina eats plums at dawn.")), "rows.jsonl", 7)
P = np.array([0.4, 0.3, 0.15, 0.1, 0.05])  # a policy over five answers
R = np.array([0.0, 1.0, -0.5, 2.0, 0.7])  # and their scores


def test_the_distance_of_best_of_n():
    """S8: n = 16: 1.835. The exact KL, from enumeration, reaches the bound for many distinct answers and stays below it for few."""
    assert kl_of_best_of_n(16) == pytest.approx(1.835, abs=5e-4) and kl_of_best_of_n(1) == 0
    for answers, close in ((4, 0.5), (20_000, 1e-3)):
        cumulative = np.arange(answers + 1) / answers  # equally likely, all scores different
        chosen = np.diff(cumulative**16)
        exact = float((chosen * np.log(chosen * answers))[chosen > 0].sum())
        assert exact <= kl_of_best_of_n(16) + 1e-9 and (abs(exact - kl_of_best_of_n(16)) < close) == (answers > 4)
    with pytest.raises(ValueError, match="n is 0"):
        kl_of_best_of_n(0)


def test_the_best_is_the_first_of_the_largest():
    assert best(np.array([0.1, 0.7, 0.3, 0.7])) == 1


def p_value(counts: np.ndarray, expected: np.ndarray) -> float:
    """Of Pearson's chi-square over five cells, 4 degrees of freedom: P(X > x) = exp(-x/2) (1 + x/2)."""
    half = float(((counts - expected) ** 2 / expected).sum()) / 2
    return math.exp(-half) * (1 + half)


def accepted(beta: float, bound: float | None, size: int, seed: int = 0) -> tuple[np.ndarray, int]:
    """Counts of each accepted answer, of `size` drawn at once, and how many were drawn."""
    numbers, counts, rounds = np.random.default_rng(seed), np.zeros(len(P)), 240_000 // size
    for _ in range(rounds):
        drawn = numbers.choice(len(P), size, p=P)
        taken = drawn[rejection_sample(R[drawn], numbers.random(size), beta=beta, bound=bound)]
        counts += np.bincount(taken, minlength=len(P))
    return counts, rounds * size


@pytest.mark.parametrize("beta", [0.5, 2.0])
@pytest.mark.parametrize("bound, size", [(2.0, 240_000), (3.5, 240_000), (None, 256)])
def test_accepted_answers_are_boltzmann(beta: float, bound: float | None, size: int):
    """S9: pi(y) exp(r / beta) / Z by a chi-square test; as many are accepted as the acceptance probabilities say."""
    counts, drawn = accepted(beta, bound, size)
    boltzmann = P * np.exp(R / beta)
    wanted = boltzmann / boltzmann.sum()
    assert p_value(counts, wanted * counts.sum()) > 1e-3
    assert p_value(counts, P * counts.sum()) < 1e-6, "the test sees the difference from the policy itself"
    other = P * np.exp(R / (1.15 * beta))
    assert p_value(counts, other / other.sum() * counts.sum()) < 1e-3, "and from a temperature 15 % higher"
    rate = float((P * np.exp((R - (2.0 if bound is None else bound)) / beta)).sum())
    assert counts.sum() / drawn == pytest.approx(rate, abs=4 * math.sqrt(rate / drawn))


def test_rejection_sampling_refuses_what_is_no_probability():
    with pytest.raises(ValueError, match="above the bound 1"):
        rejection_sample(R, np.zeros(5), beta=1.0, bound=1.0)
    with pytest.raises(ValueError, match="beta is 0"):
        rejection_sample(R, np.zeros(5), beta=0.0)


def test_neighbours_make_pairs_and_ties_none():
    assert pairs_of(np.array([1.0, 2.0, 5.0, 3.0, 4.0, 4.0, 9.0])) == [(1, 0), (2, 3)]


def test_pairs_come_from_accepted_answers_that_were_finished():
    answers = [Candidate(f"answer {i}", i != 3, 4) for i in range(8)]
    scores = [0.1, 0.9, 0.5, 5.0, 0.8, 0.2, 0.95, 0.6]
    entry = Drawn(ROW, answers, scores)
    pairs, facts = sampled_pairs([entry], RSOConfig(n=8, beta=1e9, accepted=4), seed=0)
    assert [(pair["score_chosen"], pair["score_rejected"]) for pair in pairs] == [(0.9, 0.1), (0.8, 0.5)] and facts["accepted"] == 1
    assert pairs[0]["prompt"] == [{"role": "user", "content": "What?"}] and pairs[0]["chosen"] == "answer 1"
    few, facts = sampled_pairs([entry], RSOConfig(n=8, beta=1e-6, accepted=4), seed=0)
    assert few == [] and facts["accepted"] == 1 / 7 and facts["score"] == 0.95, "towards beta 0 the best alone"


def test_verifiers():
    assert exact_match(ROW, " Mina eats  plums at dawn.") == 1 and exact_match(ROW, "Mina eats plums") == 0
    assert words_in_place(ROW, "Mina eats cheese at noon.") == 3 / 5 and words_in_place(ROW, "") == 0
    assert words_in_place(ROW, "Mina eats plums at dawn. And more.") == 5 / 7


def test_a_scorer_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_scorers_of_this_test.py").write_text("def length(row, answer):\n    return -len(answer)\n\ndef broken(row, answer):\n    return float('nan')\n")
    monkeypatch.chdir(tmp_path)
    for name in (f"{tmp_path}/my_scorers_of_this_test.py:length", "my_scorers_of_this_test:length"):
        assert score_of(load_scorer(name), ROW, "abc", name) == -3
    with pytest.raises(ConfigError, match="gave nan for rows.jsonl:7"):
        score_of(load_scorer("my_scorers_of_this_test:broken"), ROW, "abc", "broken")
    for name in ("exact", "my_scorers_of_this_test:lenght", "no_such_module:f", "/no/such/file.py:f"):
        with pytest.raises(ConfigError, match="give exact_match, words_in_place, or module:function"):
            load_scorer(name)

"""Best-of-n and rejection sampling as arithmetic: what they keep, the distribution they leave, the scorers they ask."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from megalign.best_of_n import kept
from megalign.config.errors import ConfigError
from megalign.config.schema import RSOConfig
from megalign.data.rows import Conversation, Message
from megalign.rewards.selection import best, pairs_of, rejection_sample
from megalign.rewards.verifiers import exact_match, load_scorer, score_of, words_in_place
from megalign.rollout.candidates import Candidate
from megalign.rso import sampled_pairs
from megalign.trainer.drawn import Drawn

ROW = Conversation((Message("user", "What?"), Message("assistant", "Mina eats plums at dawn.")), "rows.jsonl", 7)
P = np.array([0.4, 0.3, 0.15, 0.1, 0.05])  # a policy over five answers
R = np.array([0.0, 1.0, -0.5, 2.0, 0.7])  # and their scores


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


def test_the_best_finished_answer_is_imitated_unless_it_is_bad():
    texts, scores = ["cut", "bad", "worst", "good", "fair"], [0.9, 0.2, -1.0, 0.7, 0.4]
    entry = Drawn(ROW, [Candidate(text, text != "cut", 3) for text in texts], scores)
    none = Drawn(ROW, [Candidate("cut", False, 3)] * 2, [1.0, 2.0])
    (line,) = kept([none, entry], None)
    assert line == {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "good"}], "score": 0.7}
    assert kept([entry], 0.7) == [line] and kept([entry], 0.71) == []


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
        with pytest.raises(ConfigError, match="give exact_match, words_in_place, reward_model, or module:function"):
            load_scorer(name)

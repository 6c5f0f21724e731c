"""Answers to one prompt are scored on one copy of it: the same rewards as one by one, for fewer tokens."""

from __future__ import annotations

import numpy as np
import pytest
import shared_scoring_checks
from ranks import run_ranks
from shared_scoring_checks import LENGTH, VOCABULARY

NUMBERS = np.random.default_rng(0)


def tokens(count: int) -> list[int]:
    return NUMBERS.integers(1, VOCABULARY, count).tolist()


PROMPT, OTHER, LONG = tokens(24), tokens(20), tokens(60)
DOCUMENTS = [
    PROMPT + tokens(9), PROMPT + tokens(3),  # two answers: 24 tokens are saved
    tokens(17),
    OTHER + tokens(5), OTHER,  # the second is the front of the first, and keeps its last token: 19
    OTHER + tokens(4), PROMPT + tokens(6), PROMPT + tokens(6), PROMPT + tokens(2),  # of three the first two: 24
    LONG + tokens(30), LONG + tokens(20),  # do not fit into a row together
    tokens(8), tokens(8),
]  # fmt: skip


def test_rewards_are_those_of_each_document_alone():
    (alone, together, apart, computed), (mixed, mixture, _, whole) = run_ranks(both, 1)[0]
    np.testing.assert_allclose(together, np.array(alone)[:, 0], rtol=0, atol=2e-6)
    assert np.std(together) > 0.1, "a model that says the same of everything would show nothing"
    assert len(LONG) + 30 + 20 > LENGTH
    assert (apart, computed) == (sum(map(len, DOCUMENTS)), sum(map(len, DOCUMENTS)) - 24 - 19 - 24)
    np.testing.assert_allclose(mixture, np.array(mixed)[:, 0], rtol=0, atol=2e-6)
    assert whole == sum(map(len, DOCUMENTS)), "a router that counts tokens would count a shared prompt once"


def both() -> list[tuple[list[list[float]], list[float], int, int]]:
    experts = dict(num_moe_experts=4, moe_router_topk=2, moe_aux_loss_coeff=0.01)
    return [shared_scoring_checks.scores(DOCUMENTS, model) for model in ({}, experts)]


@pytest.mark.parametrize(
    "documents, length, expected",
    [
        ([PROMPT + [1], PROMPT + [2]], 99, [(0, 2, 24)]),
        ([PROMPT + [1], PROMPT + [2]], 25, [(0, 1, 0), (1, 1, 0)]),
        ([PROMPT[:15] + [1], PROMPT[:15] + [2]], 99, [(0, 1, 0), (1, 1, 0)]),
        ([PROMPT, PROMPT], 99, [(0, 2, 23)]),
        ([], 99, []),
    ],
)
def test_which_stand_together(documents: list[list[int]], length: int, expected: list[tuple[int, int, int]]):
    from megalign.scoring import alike

    assert alike([np.array(document) for document in documents], length) == expected

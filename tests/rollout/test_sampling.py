"""V5: what is drawn follows the exact distribution; log-probabilities are those of that distribution."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megalign.config.errors import ConfigError
from megalign.rollout.sampler import SamplingParams, distribution, sample

LOGITS = [1.2, -0.7, 2.9, 0.0, 2.4, -3.0, 1.9, 0.6, 1.2, -1.1, 9.0, 9.0]
VOCAB = 10  # the last two are padding of the table, and would win
SEEN = [2, 5, 6]


def exact(temperature: float, top_k: int, top_p: float, penalty: float) -> list[float]:
    """The definition, in plain Python, a token at a time."""
    logits = LOGITS[:VOCAB]
    logits = [(x / penalty if x > 0 else x * penalty) if i in SEEN else x for i, x in enumerate(logits)]
    weights = [math.exp(x / temperature) for x in logits]
    order = sorted(range(VOCAB), key=lambda i: (-weights[i], i))[: top_k or VOCAB]
    total, nucleus, mass = sum(weights[i] for i in order), [], 0.0
    for i in order:
        nucleus.append(i)
        mass += weights[i] / total
        if mass >= top_p:
            break
    kept = sum(weights[i] for i in nucleus)
    return [weights[i] / kept if i in nucleus else 0.0 for i in range(VOCAB)]


SETTINGS = [
    (1.0, 0, 1.0, 1.0),
    (0.5, 0, 1.0, 1.0),
    (1.7, 0, 1.0, 1.0),
    (1.0, 4, 1.0, 1.0),
    (1.0, 5, 1.0, 1.0),  # the fifth and sixth are equal
    (1.0, 0, 0.7, 1.0),
    (1.0, 0, 0.01, 1.0),  # one token is left
    (1.0, 0, 1.0, 1.8),
    (0.8, 6, 0.85, 1.3),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_draws_follow_the_exact_distribution(settings: tuple[float, int, float, float]):
    draws, expected = 20_000, exact(*settings)
    seen = torch.zeros(draws, len(LOGITS), dtype=torch.bool)
    seen[:, SEEN] = True
    uniform = torch.rand(draws, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tokens, logprobs = sample(
        torch.tensor(LOGITS).repeat(draws, 1),
        SamplingParams(*settings),
        vocab_size=VOCAB,
        uniform_B=uniform,
        seen_BV=seen,
    )
    counts = torch.bincount(tokens, minlength=VOCAB).tolist()
    assert not any(n for n, p in zip(counts, expected, strict=True) if p == 0)
    assert chi_square_p_value(counts, expected) > 1e-3
    drawn = torch.tensor(expected, dtype=torch.float64)[tokens]
    torch.testing.assert_close(logprobs.exp(), drawn, rtol=1e-6, atol=0)


def chi_square_p_value(counts: list[int], probabilities: list[float]) -> float:
    """P(X >= x) for Pearson's statistic x, X ~ chi-square with (cells - 1) degrees of freedom.

    Cells that expect fewer than 5 are taken together (Cochran's rule).
    """
    every = [(n, p * sum(counts)) for n, p in zip(counts, probabilities, strict=True) if p]
    pairs, rare = [pair for pair in every if pair[1] >= 5], [pair for pair in every if pair[1] < 5]
    if rare:
        pairs.append((sum(n for n, _ in rare), sum(mean for _, mean in rare)))
    statistic = sum((n - mean) ** 2 / mean for n, mean in pairs)
    if len(pairs) == 1:
        return 1.0
    half_freedom = torch.tensor((len(pairs) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half_freedom, torch.tensor(statistic / 2, dtype=torch.float64)))


def test_the_chi_square_test_can_fail():
    """Draws at temperature 1 are not taken for draws at temperature 0.95."""
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits = torch.tensor(LOGITS).repeat(20_000, 1)
    tokens, _ = sample(logits, SamplingParams(), vocab_size=VOCAB, uniform_B=uniform)
    assert (
        chi_square_p_value(torch.bincount(tokens, minlength=VOCAB).tolist(), exact(0.95, 0, 1.0, 1.0)) < 1e-3
    )


def test_greedy_takes_the_first_of_the_best_with_certainty():
    logits = torch.tensor([[0.0, 3.0, 3.0, 9.0], [5.0, 1.0, 2.0, 9.0]])
    uniform = torch.tensor([0.99, 0.5], dtype=torch.float64)
    tokens, logprobs = sample(logits, SamplingParams(temperature=0), vocab_size=3, uniform_B=uniform)
    assert tokens.tolist() == [1, 0] and logprobs.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_ends_of_the_unit_interval_give_tokens_that_have_probability(uniform: float):
    logits = torch.tensor([[-1e9, 0.0, 1.0, -1e9, 5.0]])
    one = torch.tensor([uniform], dtype=torch.float64)
    tokens, logprobs = sample(logits, SamplingParams(), vocab_size=4, uniform_B=one)
    assert tokens.item() == (1 if uniform == 0 else 2) and logprobs.item() > -2


def test_a_row_does_not_depend_on_the_others_and_the_logits_stay():
    logits = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before, params = logits.clone(), SamplingParams(temperature=0.7, top_k=7, top_p=0.9)
    together = distribution(logits, params, vocab_size=11)
    alone = torch.cat([distribution(row[None], params, vocab_size=11) for row in logits])
    assert torch.equal(together, alone) and torch.equal(logits, before)


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 0.0),
    ]
    + [("top_p", 1.1), ("repetition_penalty", 0.0)],
)
def test_values_out_of_range_are_named(field: str, value: Any):
    with pytest.raises(ConfigError, match=rf"sampling\.{field} is {value}: it must be"):
        SamplingParams(**{field: value})

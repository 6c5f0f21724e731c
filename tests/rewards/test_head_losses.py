"""A head's loss on the documents of a batch: which it counts, that others change nothing, and what its numbers mean."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megalign.config.schema import HeadConfig
from megalign.losses import reward as losses
from megalign.rewards.heads import columns_of, head_count, head_loss, probabilities, reading, shapes_of

NAN = math.nan
# A pair, a single answer, another pair that this head judges the other way, a pair it knows nothing of.
FACTS = {
    "side": torch.tensor([1.0, -1, 0, 1, -1, 1, -1]), "weight": torch.tensor([1.0, 1, 1, 0.5, 0.5, 1, 1]), "margin": torch.tensor([0.4, 0.4, 0, 0, 0, 0, 0]),
    "q": torch.tensor([1.0, 1, NAN, -1, -1, NAN, NAN]), "s": torch.tensor([NAN, NAN, 2, NAN, NAN, NAN, NAN]),
    "g": torch.tensor([NAN, 3.0, 2, NAN, NAN, NAN, NAN]), "g.observed": torch.tensor([1.0, 0, 1, 1, 1, 1, 1]),
}  # fmt: skip
VALUES = torch.tensor([[2.0], [0.5], [9.0], [1.0], [3.0], [7.0], [8.0]], dtype=torch.float64)


def test_pairs_by_this_heads_measure():
    head = HeadConfig(margin=0.5)
    found = head_loss("q", head, VALUES, FACTS)
    one, other = math.log1p(math.exp(-(2 - 0.5 - 0.5 * 0.4))), math.log1p(math.exp(-(3 - 1)))
    assert float(found.sum) == pytest.approx(one + 0.5 * other) and float(found.count) == 1.5 == float(head_count("q", head, FACTS))
    assert float(found.metrics["accuracy"]) == 1.5


def test_options_off_is_bradley_terry():
    """R5, R1: without margin and smoothing, softplus(-difference): 0.6931 at 0, 0.2014 at 1.5, 0.0486 at 3."""
    for difference, expected in ((0.0, 0.6931), (1.5, 0.2014), (3.0, 0.0486)):
        facts = {"side": torch.tensor([1.0, -1]), "weight": torch.ones(2), "margin": torch.ones(2), "q": torch.ones(2)}
        assert float(head_loss("q", HeadConfig(), torch.tensor([[difference], [0.0]]), facts).sum) == pytest.approx(expected, abs=5e-5)


def test_heads_are_isolated():
    """R7: a head's loss has no gradient for another's numbers, and none for answers whose label it does not know."""
    heads = {"q": HeadConfig(), "s": HeadConfig(loss="classification", classes=3), "g": HeadConfig(loss="weibull")}
    columns = columns_of(heads)
    assert [(column.start, column.stop) for column in columns.values()] == [(0, 1), (1, 4), (4, 6)]
    for name, head in heads.items():
        values = torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        head_loss(name, head, values[:, columns[name]], FACTS).sum.backward()
        assert values.grad is not None
        moved = values.grad.abs() > 0
        assert not moved[:, [i for i in range(6) if not columns[name].start <= i < columns[name].stop]].any()
        assert moved.any(-1).tolist() == {"q": [1, 1, 0, 1, 1, 0, 0], "s": [0, 0, 1, 0, 0, 0, 0], "g": [0, 1, 1, 0, 0, 0, 0]}[name]
        assert float(head_count(name, head, FACTS)) == {"q": 1.5, "s": 1, "g": 2}[name]


def test_a_batch_of_padding_costs_nothing():
    heads = {"q": HeadConfig(), "o": HeadConfig(loss="ordinal", classes=4), "w": HeadConfig(loss="weibull"), "c": HeadConfig(loss="classification", classes=2)}
    from megalign.rewards.heads import facts_of

    facts = facts_of({}, heads, torch.device("cpu"))
    values = torch.zeros(0, sum(shape.width for shape in shapes_of(heads).values()), requires_grad=True)
    total = sum(head_loss(name, head, values[:, columns_of(heads)[name]], facts).sum for name, head in heads.items())
    assert float(total) == 0 and torch.isfinite(torch.as_tensor(total))  # pyright: ignore
    total.backward()  # pyright: ignore


def test_ordinal_thresholds_get_the_whole_gradient():
    """Each document carries a copy of the thresholds: together their gradients are that of one."""
    free = torch.tensor([-1.0, 0.3, 0.2], dtype=torch.float64, requires_grad=True)
    scores = torch.tensor([0.5, -0.2, 1.0], dtype=torch.float64)
    labels = torch.tensor([0.0, 2.0, 3.0])
    head = HeadConfig(loss="ordinal", classes=4)
    facts = {"side": torch.zeros(3), "weight": torch.ones(3), "margin": torch.zeros(3), "o": labels}
    head_loss("o", head, torch.cat([scores[:, None], free.expand(3, -1)], -1), facts).sum.backward()
    given = free.grad
    expected = torch.autograd.grad(losses.ordinal_loss(scores, losses.ordered_thresholds(free), labels.long()).sum, free)[0]
    assert given is not None and torch.allclose(given, expected, rtol=1e-12)


def test_what_numbers_mean():
    assert reading(HeadConfig(loss="binary"), np.array([[0.0], [math.log(3)]])) == pytest.approx([0.5, 0.75])
    assert reading(HeadConfig(loss="regression", scale="log1p"), np.array([[math.log(5)]])) == pytest.approx([4])
    assert reading(HeadConfig(loss="classification", classes=3), np.array([[0.1, 2, 0.3]])).tolist() == [1]
    assert probabilities(HeadConfig(loss="classification", classes=2), np.array([[0.0, math.log(3)]]))[0] == pytest.approx([0.25, 0.75])
    assert reading(HeadConfig(loss="exponential"), np.array([[math.log(7)]])) == pytest.approx([7])
    assert reading(HeadConfig(loss="weibull"), np.array([[math.log(2), math.log(0.5)]])) == pytest.approx([2 * math.gamma(3)])
    # Two thresholds, at -0.5 and 0.5 (softplus(log(e - 1)) = 1), score 0: P(y > 0) + P(y > 1) = sigma(0.5) + sigma(-0.5) = 1
    assert reading(HeadConfig(loss="ordinal", classes=3), np.array([[0.0, -0.5, math.log(math.e - 1)]])) == pytest.approx([1.0])


@pytest.mark.parametrize("loss", ["exponential", "weibull"])
def test_censored_times_are_not_biased(loss: str):
    """R11: at 30 % censoring the fitted mean is the true one; taking censored times for events would be too short."""
    numbers = torch.Generator().manual_seed(4)
    truth = -4.0 * torch.rand(20000, generator=numbers, dtype=torch.float64).log()
    end = -4.0 * 7 / 3 * torch.rand(20000, generator=numbers, dtype=torch.float64).log()
    facts = {"side": torch.zeros(20000), "weight": torch.ones(20000), "margin": torch.zeros(20000), "t": torch.minimum(truth, end), "t.observed": (truth <= end).double()}
    assert float(facts["t.observed"].mean()) == pytest.approx(0.7, abs=0.02)
    head = HeadConfig(loss=loss)  # type: ignore[arg-type]
    for observed, expected in ((facts["t.observed"], 4.0), (torch.ones(20000), 2.8)):
        free = torch.zeros(shapes_of({"t": head})["t"].width, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([free], max_iter=60)

        def closure(free=free, optimizer=optimizer, observed=observed):
            optimizer.zero_grad()
            value = head_loss("t", head, free.expand(20000, -1), {**facts, "t.observed": observed}).sum / 20000
            value.backward()
            return value

        optimizer.step(closure)  # pyright: ignore
        assert reading(head, free.detach().numpy()[None])[0] == pytest.approx(expected, rel=0.03)

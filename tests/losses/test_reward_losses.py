"""Losses of reward models and of predictors of behaviour."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from megalign.losses.reward import (
    binary_loss,
    bradley_terry_loss,
    classification_loss,
    exponential_survival_loss,
    ordered_thresholds,
    ordinal_loss,
    regression_loss,
    weibull_survival_loss,
)


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("margin, value", [(0.0, 0.6931), (1.5, 0.2014), (3.0, 0.0486)])
def test_bradley_terry_golden_numbers(margin: float, value: float):
    """R1."""
    found = bradley_terry_loss(numbers(margin + 2), numbers(2))
    assert found.sum.item() == pytest.approx(value, abs=6e-5)
    assert found.metrics["margin"].item() == margin and found.metrics["accuracy"].item() == float(margin > 0)
    assert found.metrics["mean_reward"].item() == 2 + margin / 2


def test_bradley_terry_options():
    """R5: a margin to keep, smoothing as cDPO's, centring; off they change nothing."""
    chosen, rejected = numbers(2.5, 0.0), numbers(1.0, 1.0)
    assert torch.sigmoid(chosen[0] - rejected[0]).item() == pytest.approx(0.8176, abs=5e-5)
    plain = bradley_terry_loss(chosen, rejected)
    assert plain.sum.item() == bradley_terry_loss(chosen, rejected, margin_P=numbers(0, 0), label_smoothing=0.0, centering=0.0).sum.item()
    kept = bradley_terry_loss(chosen, rejected, margin_P=numbers(1.5, 0.0)).sum.item()
    assert kept == pytest.approx(math.log(2) + math.log1p(math.e))
    smoothed = bradley_terry_loss(chosen[:1], rejected[:1], label_smoothing=0.1).sum.item()
    assert smoothed == pytest.approx(0.9 * math.log1p(math.exp(-1.5)) + 0.1 * math.log1p(math.exp(1.5)))
    centred = bradley_terry_loss(chosen, rejected, centering=0.01).sum.item()
    assert centred - plain.sum.item() == pytest.approx(0.01 * (3.5**2 + 1.0))
    halved = bradley_terry_loss(chosen, rejected, weights_P=numbers(0.5, 0.5))
    assert halved.sum.item() == pytest.approx(plain.sum.item() / 2) and float(halved.count) == 1.0


def test_constants_of_a_prompt_cancel():
    """R14, of pairs: what is added to both answers of a prompt (its difficulty, its user) changes neither loss nor gradient."""
    chosen, rejected, constant = numbers(2.5, 0.0), numbers(1.0, 1.0), numbers(7.0, -30.0)
    gradients = []
    for offset in (torch.zeros(2), constant):
        free = (chosen + offset).requires_grad_()
        bradley_terry_loss(free, rejected + offset).sum.backward()
        gradients.append((float(bradley_terry_loss(free.detach(), rejected + offset).sum), free.grad))
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-12) and torch.allclose(gradients[0][1], gradients[1][1], rtol=1e-12)  # pyright: ignore


def test_ordinal_probabilities_sum_to_one_and_follow_the_formula():
    scores, thresholds = numbers(-3.0, 0.2, 4.0), ordered_thresholds(numbers(-1.0, 0.5, -2.0))
    assert (thresholds.diff() > 0).all()
    logp = torch.stack([torch.stack([-ordinal_loss(s[None], thresholds, torch.tensor([y])).sum for y in range(4)]) for s in scores])
    torch.testing.assert_close(logp.exp().sum(-1), torch.ones(3, dtype=torch.float64))
    middle = torch.sigmoid(thresholds[2] - scores) - torch.sigmoid(thresholds[1] - scores)
    torch.testing.assert_close(logp[:, 2].exp(), middle)
    far = ordinal_loss(torch.tensor([60.0, -60.0]), thresholds.float(), torch.tensor([0, 3]))
    assert far.sum.item() == pytest.approx(60 - thresholds[0].item() + 60 + thresholds[2].item(), rel=1e-5), "no underflow"


def test_exponential_and_weibull_likelihoods():
    time, scale = 3.0, 2.0
    for observed, value in ((True, math.log(scale) + time / scale), (False, time / scale)):
        found = exponential_survival_loss(numbers(math.log(scale)), numbers(time), torch.tensor([observed]))
        assert found.sum.item() == pytest.approx(value)
        one = weibull_survival_loss(numbers(math.log(scale)), numbers(0.0), numbers(time), torch.tensor([observed]))
        assert one.sum.item() == pytest.approx(value), "shape 1 is exponential"
    shape = 0.7
    density = torch.distributions.Weibull(numbers(scale), numbers(shape)).log_prob(numbers(time)).item()
    found = weibull_survival_loss(numbers(math.log(scale)), numbers(math.log(shape)), numbers(time), torch.tensor([True]))
    assert found.sum.item() == pytest.approx(-density)


def test_censoring_leaves_no_bias():
    """R11: 30 % censored; the fitted scale is that of the times, where leaving censored rows out halves it almost."""
    draw = torch.Generator().manual_seed(5)
    count, scale = 20_000, 4.0
    times = -torch.rand(count, generator=draw, dtype=torch.float64).log() * scale
    ends = -torch.rand(count, generator=draw, dtype=torch.float64).log() * scale * 7 / 3  # P(end before event) = 0.3
    observed, seen = times <= ends, torch.minimum(times, ends)
    assert float((~observed).double().mean()) == pytest.approx(0.3, abs=0.01)

    def fitted(keep: torch.Tensor) -> float:
        log_scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([log_scale], max_iter=50, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            found = exponential_survival_loss(log_scale.expand(int(keep.sum())), seen[keep], observed[keep])
            mean = found.sum / found.count
            mean.backward()
            return mean

        optimizer.step(closure)  # pyright: ignore[reportArgumentType]
        return float(log_scale.detach().exp())

    error = scale / math.sqrt(count * 0.7)
    assert abs(fitted(torch.ones_like(observed)) - scale) < 4 * error
    assert fitted(observed) < 0.8 * scale


def test_gradients_are_those_of_the_formula():
    torch.manual_seed(0)
    a, b = torch.randn(4, dtype=torch.float64, requires_grad=True), torch.randn(4, dtype=torch.float64, requires_grad=True)
    labels, flags, times = torch.tensor([0, 3, 1, 2]), torch.tensor([True, False, True, True]), numbers(0.5, 2.0, 0.1, 7.0)
    assert gradcheck(lambda x, y: bradley_terry_loss(x, y, margin_P=0.3, label_smoothing=0.1, centering=0.01).sum, (a, b))
    assert gradcheck(lambda x: regression_loss(x, times).sum, (a,))
    free = numbers(-1.0, 0.3, 0.6).requires_grad_()
    assert gradcheck(lambda x, t: ordinal_loss(x, ordered_thresholds(t), labels).sum, (a, free))
    assert gradcheck(lambda x: binary_loss(x, flags).sum, (a,))
    assert gradcheck(lambda x: exponential_survival_loss(x, times, flags).sum, (a,))
    assert gradcheck(lambda x, k: weibull_survival_loss(x, k, times, flags).sum, (a, numbers(0.3).requires_grad_()))
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: classification_loss(x, labels, label_smoothing=0.1).sum, (logits,))


def test_sums_and_metrics_of_the_simple_ones():
    found = regression_loss(numbers(1.0, 2.0), numbers(0.0, 4.0), weights_N=numbers(1.0, 0.5))
    assert (found.sum.item(), float(found.count), found.metrics["absolute_error"].item()) == (3.0, 1.5, 2.0)
    found = classification_loss(torch.zeros(3, 4), torch.tensor([0, 1, 2]))
    assert found.sum.item() == pytest.approx(3 * math.log(4)) and found.metrics["accuracy"].item() == 1
    found = binary_loss(torch.tensor([2.0, 2.0]), torch.tensor([True, False]))
    assert found.sum.item() == pytest.approx(math.log1p(math.exp(-2)) + math.log1p(math.exp(2))) and found.metrics["accuracy"].item() == 1
    found = ordinal_loss(torch.tensor([-5.0, 5.0, 5.0]), torch.tensor([-1.0, 1.0]), torch.tensor([0, 2, 1]))
    assert found.metrics["accuracy"].item() == 2

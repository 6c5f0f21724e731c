"""Losses on pairs and on labelled answers: golden numbers of the requirements, formulas, gradients, invariances."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from megalign.losses import preference
from megalign.losses.pairs import Pairs, PairTerms
from megalign.losses.preference import (
    aot_loss,
    aot_unpaired_loss,
    apo_down_loss,
    apo_zero_loss,
    bco_loss,
    cdpo_loss,
    cpo_loss,
    discopop_loss,
    dpo_loss,
    exo_loss,
    hinge_loss,
    ipo_loss,
    ipo_sum_loss,
    log1mexp,
    nca_loss,
    orpo_loss,
    robust_dpo_loss,
    rpo_loss,
    sigmoid_norm_loss,
    simpo_loss,
    sppo_hard_loss,
)
from megalign.losses.unpaired import apo_zero_unpaired_loss, kto_baseline, kto_loss

REFERENCE_FREE = {"orpo_loss", "simpo_loss", "cpo_loss"}
LOSSES: dict[str, Callable[..., PairTerms]] = {
    name: function for name, function in vars(preference).items() if name.endswith("_loss") and inspect.isfunction(function)
}


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def fixture(**changes: torch.Tensor) -> Pairs:
    """Policy (-10, -14), reference (-11, -12): delta 3; answers of 5 and 7 tokens."""
    return replace(Pairs(numbers(-10), numbers(-14), numbers(5), numbers(7), numbers(-11), numbers(-12)), **changes)


def equal() -> Pairs:
    return fixture(ref_chosen_P=numbers(-10), ref_rejected_P=numbers(-14))


def random_pairs(count: int = 5, seed: int = 0, gradient: bool = False) -> Pairs:
    """Sums of some 4 to 12 tokens at about -1 each."""
    draw = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(4, 13, (count,), generator=draw) for _ in range(2)]
    sums = [-(0.5 + torch.rand(count, generator=draw, dtype=torch.float64)) * tokens[i % 2] for i in range(4)]
    return Pairs(sums[0].requires_grad_(gradient), sums[1].requires_grad_(gradient), tokens[0], tokens[1], sums[2], sums[3])


def chance(x: float) -> float:
    """sigma(x)."""
    return 1 / (1 + math.exp(-x))


GOLDEN = [  # requirement, terms, value to four digits
    ("O1 equal", dpo_loss(equal()), math.log(2)),
    ("O1 .1", dpo_loss(fixture(), beta=0.1), 0.5544),
    ("O1 .5", dpo_loss(fixture(), beta=0.5), 0.2014),
    ("O2 cDPO", cdpo_loss(fixture(), beta=0.1, label_smoothing=0.1), 0.5844),
    ("O2 robust", robust_dpo_loss(fixture(), beta=0.1, label_smoothing=0.1), 0.5169),
    ("O3 sum", ipo_sum_loss(fixture(), beta=0.1), 4.0),
    ("O3 mean", ipo_loss(fixture(), beta=0.1), ((-10 + 11) / 5 - (-14 + 12) / 7 - 5) ** 2),
    ("O5", orpo_loss(fixture(chosen_P=numbers(-10), rejected_P=numbers(-14)), beta=0.1), 2.0693),
    ("O6", simpo_loss(fixture(), gamma=1.0), 1.3133),
    ("O7 weight 0", rpo_loss(fixture(), nll_weight=0.0), 0.5544),
    ("O7 weight .5", rpo_loss(fixture(), nll_weight=0.5), 0.5544 + 0.5 * 2),
    ("hinge", hinge_loss(fixture(), beta=0.1), 0.7),
    ("hinge, far apart", hinge_loss(fixture(), beta=0.5), 0.0),
    ("SPPO", sppo_hard_loss(fixture(), beta=0.1), (1 - 5) ** 2 + (-2 + 5) ** 2),
    ("BCO, shifted", bco_loss(fixture(), beta=0.1, reward_shift=-0.05), math.log1p(math.exp(-0.15)) + math.log1p(math.exp(-0.15))),
    # Rewards .1 and -.2, their difference .3; per token 1/5 and -2/7.
    ("DPO per token", sigmoid_norm_loss(fixture(), beta=0.1), math.log1p(math.exp(-0.1 * (1 / 5 + 2 / 7)))),
    ("EXO", exo_loss(fixture(), beta=0.1, label_smoothing=0.1), chance(0.3) * math.log(chance(0.3) / 0.9) + chance(-0.3) * math.log(chance(-0.3) / 0.1)),
    ("NCA", nca_loss(fixture(), beta=0.1), -math.log(chance(0.1)) - 0.5 * math.log(chance(-0.1)) - 0.5 * math.log(chance(0.2))),
    ("BCO", bco_loss(fixture(), beta=0.1), -math.log(chance(0.1)) - math.log(chance(0.2))),
    ("APO zero", apo_zero_loss(fixture(), beta=0.1), 1 - chance(0.1) + chance(-0.2)),
    ("APO down", apo_down_loss(fixture(), beta=0.1), chance(0.1) + 1 - chance(0.3)),
    ("DiscoPOP", discopop_loss(fixture(), beta=0.1, tau=0.05), -math.log(chance(0.3)) * chance(-6.0) + math.exp(-0.3) * chance(6.0)),
    ("AOT, a single pair", aot_loss(fixture(), beta=0.1, label_smoothing=0.1), 0.5844),
    ("CPO", cpo_loss(fixture(), beta=0.1, nll_weight=1.0), math.log1p(math.exp(-0.4)) + 2),
]


@pytest.mark.parametrize("name, terms, value", GOLDEN, ids=[name for name, *_ in GOLDEN])
def test_golden_number(name: str, terms: PairTerms, value: float):
    assert terms.losses_P.item() == pytest.approx(value, abs=6e-5)


def test_kto_golden_numbers():
    """O4: z = .2, beta .1; a log-ratio of 1 wanted, of -2 unwanted."""
    pairs = fixture()
    assert pairs.ref_chosen_P is not None and pairs.ref_rejected_P is not None
    logprobs, reference = torch.cat([pairs.chosen_P, pairs.rejected_P]), torch.cat([pairs.ref_chosen_P, pairs.ref_rejected_P])
    for which, label, value in ((0, True, 0.4800), (1, False, 0.4452)):
        found = kto_loss(logprobs[which : which + 1], reference[which : which + 1], torch.tensor([label]), 0.2, beta=0.1)
        assert found.sum.item() == pytest.approx(value, abs=6e-5)
    both = kto_loss(logprobs, reference, torch.tensor([True, False]), 0.2, beta=0.1, desirable_weight=2.0, undesirable_weight=0.5)
    assert both.sum.item() == pytest.approx(2 * 0.4800 + 0.5 * 0.4452, abs=2e-4) and both.count == 2
    total, count = both.ratios["rewards/rejected"]
    assert (total / count).item() == pytest.approx(0.1 * -2)
    plain = apo_zero_unpaired_loss(logprobs, reference, torch.tensor([True, False]), beta=0.1, desirable_weight=2.0, undesirable_weight=0.5)
    assert plain.sum.item() == pytest.approx(2 * (1 - chance(0.1)) + 0.5 * chance(-0.2))


def test_kto_baseline_is_a_constant_and_never_negative():
    policy = numbers(-5, -6).requires_grad_()
    assert kto_baseline(policy, numbers(-6, -6.5)).item() == pytest.approx(0.75)
    assert kto_baseline(policy, numbers(-6, -6.5)).requires_grad is False
    assert kto_baseline(policy, numbers(-4, -4)).item() == 0.0


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_the_formula(name: str):
    pairs = random_pairs(gradient=True)

    def loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return LOSSES[name](replace(pairs, chosen_P=chosen, rejected_P=rejected)).losses_P

    assert torch.autograd.gradcheck(loss, (pairs.chosen_P, pairs.rejected_P))


def test_gradients_of_losses_on_answers():
    policy, reference = random_pairs(gradient=True), random_pairs(seed=1)
    labels = torch.tensor([True, False, True, True, False])
    for loss in (kto_loss, apo_zero_unpaired_loss):
        more = (0.3,) if loss is kto_loss else ()
        assert torch.autograd.gradcheck(lambda x: loss(x, reference.chosen_P, labels, *more).sum, (policy.chosen_P,))  # noqa: B023


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"bco_loss", "apo_down_loss", "discopop_loss"}))
def test_a_better_chosen_answer_lowers_the_loss(name: str):
    """The sign: raising log p of the chosen answer, and lowering that of the rejected one, does not raise the loss."""
    pairs = random_pairs(gradient=True)
    LOSSES[name](pairs).losses_P.sum().backward()
    assert pairs.chosen_P.grad is not None and pairs.rejected_P.grad is not None
    if name in ("sppo_hard_loss", "ipo_sum_loss", "ipo_loss"):  # they have a target, and are far from it here
        assert pairs.chosen_P.grad.sum() < 0 < pairs.rejected_P.grad.sum()
    elif name in ("exo_loss", "nca_loss"):  # towards the label, not beyond it
        assert pairs.chosen_P.grad.sum() < 0 < pairs.rejected_P.grad.sum()
    else:
        assert (pairs.chosen_P.grad <= 0).all() and (pairs.rejected_P.grad >= 0).all()


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"aot_loss", "aot_unpaired_loss"}))
def test_a_sum_splits_into_the_sums_of_its_parts(name: str):
    """Sums, not means: two microbatches together are the sum of each, weights included; so is every metric."""
    pairs, weights = random_pairs(), torch.tensor([1.0, 0.5, 0.25, 1.0, 2.0], dtype=torch.float64)
    whole = LOSSES[name](pairs).summed(pairs, weights)
    parts = []
    for rows in (slice(0, 2), slice(2, 5)):
        part = Pairs(**{key: value[rows] for key, value in vars(pairs).items()})
        parts.append(LOSSES[name](part).summed(part, weights[rows]))
    assert whole.sum.item() == pytest.approx(sum(part.sum.item() for part in parts))
    assert float(whole.count) == pytest.approx(float(weights.sum())) == sum(float(part.count) for part in parts)
    for metric, value in whole.metrics.items():
        assert value.item() == pytest.approx(sum(part.metrics[metric].item() for part in parts)), metric
        assert not value.requires_grad


def test_metrics_are_those_of_trl():
    pairs = fixture()
    found = dpo_loss(pairs, beta=0.1).summed(pairs)
    wanted = {"rewards/chosen": 0.1, "rewards/rejected": -0.2, "rewards/margins": 0.3, "rewards/accuracies": 1.0}
    wanted |= {"logps/chosen": -10.0, "logps/rejected": -14.0}
    for name, value in wanted.items():
        assert found.metrics[name].item() == pytest.approx(value), name
    assert found.metrics["_longer"].item() == -2 and found.metrics["_margin*longer"].item() == pytest.approx(-0.6)
    worse = replace(pairs, chosen_P=numbers(-20))
    assert dpo_loss(worse).summed(worse).metrics["rewards/accuracies"].item() == 0.0
    assert dpo_loss(equal()).summed(equal()).metrics["rewards/accuracies"].item() == 0.0, "a tie is not right"


@pytest.mark.parametrize("name", sorted(set(LOSSES) - REFERENCE_FREE))
def test_a_missing_reference_is_an_error(name: str):
    with pytest.raises(ValueError, match="compares with a reference, but ref_chosen_P"):
        LOSSES[name](fixture(ref_chosen_P=None))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", sorted(REFERENCE_FREE))
def test_reference_free_losses_do_not_look_at_one(name: str):
    without = fixture(ref_chosen_P=None, ref_rejected_P=None)  # pyright: ignore[reportArgumentType]
    assert LOSSES[name](without).losses_P.item() == LOSSES[name](fixture()).losses_P.item()


@pytest.mark.parametrize("name", LOSSES)
def test_finite_where_probabilities_are_extreme(name: str):
    """FP32, log-ratios of thousands: never log(sigma)."""
    pairs = Pairs(*(torch.tensor([a, b]) for a, b in ((-3000.0, -1e-8), (-1.0, -3000.0), (9.0, 9.0), (9.0, 9.0), (-1.0, -2000.0), (-3000.0, -1.0))))
    pairs.chosen_P.requires_grad_()
    losses = LOSSES[name](pairs).losses_P
    if name == "discopop_loss":  # the paper's own exponential
        losses = losses[1:]
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert pairs.chosen_P.grad is not None and (name == "discopop_loss" or torch.isfinite(pairs.chosen_P.grad).all())


def test_log1mexp():
    for x in (-1e-5, -0.1, -0.6931, -0.6932, -5.0, -50.0):
        exact = math.log(-math.expm1(x)) if x > -1 else math.log1p(-math.exp(x))
        assert log1mexp(numbers(x)).item() == pytest.approx(exact, rel=1e-12)
    assert torch.isfinite(log1mexp(torch.zeros(1))).all()
    assert torch.autograd.gradcheck(log1mexp, (numbers(-0.01, -0.69, -0.7, -3.0).requires_grad_(),))


def test_aot_is_dpo_where_the_order_is_the_same():
    """Sorted margins that are sorted already: one pair, or equal references."""
    assert aot_loss(fixture()).losses_P.item() == dpo_loss(fixture()).losses_P.item()


def test_aot_compares_sorted_with_sorted():
    """Margins 4 and 1 of the policy, 1 and 2 of the reference: 1 - 1 and 4 - 2. Unpaired, log-ratios 1 and -1 against -2 and .5: -1 + 2 and 1 - .5."""
    zero = numbers(0, 0)
    paired = Pairs(numbers(-1, -2), numbers(-5, -3), zero + 1, zero + 1, numbers(-1, -1), numbers(-2, -3))
    assert aot_loss(paired, beta=0.1).losses_P.tolist() == pytest.approx([math.log(2), -math.log(chance(0.2))])
    unpaired = Pairs(numbers(1, -1), numbers(-2, 0.5), zero + 1, zero + 1, zero, zero)
    assert aot_unpaired_loss(unpaired, beta=0.1).losses_P.tolist() == pytest.approx([-math.log(chance(0.1)), -math.log(chance(0.05))])


def test_every_loss_has_a_closed_form_here():
    """A new loss comes with one."""
    source = inspect.getsource(inspect.getmodule(fixture))  # pyright: ignore[reportArgumentType]
    assert not [name for name in LOSSES if f"{name}(fixture(" not in source and f"{name}(unpaired" not in source]

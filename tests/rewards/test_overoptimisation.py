"""Best of n by its formula and by drawing; the inverted U of a proxy that is pushed too far."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from megalign.rewards.overoptimisation import agreement, best_of_n, best_of_n_kl, fit_curve


def test_best_of_n_is_the_mean_over_all_subsets():
    numbers = np.random.default_rng(0)
    proxy, gold = numbers.normal(size=(3, 6)), numbers.normal(size=(3, 6))
    for n in (1, 2, 4, 6):
        subsets = list(itertools.combinations(range(6), n))
        expected = np.mean([[row_gold[max(subset, key=lambda i, p=row_proxy: p[i])] for subset in subsets] for row_proxy, row_gold in zip(proxy, gold)])
        assert best_of_n(proxy, gold, n) == pytest.approx(expected)
    with pytest.raises(ValueError, match="1 to 6"):
        best_of_n(proxy, gold, 7)


def test_kl_of_best_of_n():
    """S8: n = 16: ln 16 - 15/16 = 1.835. By integration: the best of n of a uniform draw has density n u^(n-1)."""
    assert best_of_n_kl(16) == pytest.approx(1.835, abs=5e-4) and best_of_n_kl(1) == 0
    u = (np.arange(200000) + 0.5) / 200000
    density = 8 * u**7
    assert best_of_n_kl(8) == pytest.approx(float((density * np.log(density)).mean()), abs=1e-4)
    with pytest.raises(ValueError, match="n is 0"):
        best_of_n_kl(0)


def test_the_kl_is_a_bound_where_answers_repeat():
    """From enumeration: reached for many distinct answers, above the KL of few."""
    for answers, close in ((4, False), (20_000, True)):
        cumulative = np.arange(answers + 1) / answers  # equally likely, all scores different
        chosen = np.diff(cumulative**16)
        exact = float((chosen * np.log(chosen * answers))[chosen > 0].sum())
        assert exact <= best_of_n_kl(16) + 1e-9 and (abs(exact - best_of_n_kl(16)) < 1e-3) == close


def test_the_curve_is_recovered():
    kl = [0.0, *(best_of_n_kl(n) for n in (2, 4, 8, 32, 128, 1024))]
    curve = fit_curve(kl, [1.0 + math.sqrt(d) * (0.8 - 0.3 * math.sqrt(d)) for d in kl])
    assert (curve.alpha, curve.beta, curve.error) == pytest.approx((0.8, 0.3, 0.0), abs=1e-9)
    assert curve.turning_point == pytest.approx(0.8 / 0.6)
    assert fit_curve(kl, [math.sqrt(d) for d in kl]).turning_point is None or fit_curve(kl, [math.sqrt(d) for d in kl]).beta < 1e-9
    with pytest.raises(ValueError, match="untouched policy"):
        fit_curve(kl[1:], [0.0] * 6)


def test_a_proxy_with_a_heavy_flaw_rises_and_then_falls():
    """R19, R20: the proxy is the gold reward plus a flaw whose tail is heavier: far out the best of n is the flaw's best."""
    numbers = np.random.default_rng(1)
    quality = numbers.normal(size=(400, 512))
    flaw = (numbers.standard_t(3, (400, 512)) / 2).clip(min=0)
    proxy, gold = quality + flaw, quality - 0.7 * flaw
    ns = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    found = [best_of_n(proxy, gold, n) for n in ns]
    top = int(np.argmax(found))
    assert 1 < top < len(ns) - 2 and found[top] > found[0] + 0.2 and found[-1] < found[top] - 0.2
    curve = fit_curve([best_of_n_kl(n) for n in ns], found)
    assert curve.turning_point is not None and abs(curve.turning_point - math.sqrt(best_of_n_kl(ns[top]))) < 0.6
    assert agreement(gold, gold, 16) == 1.0 and agreement(proxy, gold, 4) > agreement(proxy, gold, 64)

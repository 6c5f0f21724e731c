"""Watchmen of preference optimisation on synthetic runs."""

from __future__ import annotations

import numpy as np
import pytest

from megalign.trainer.engine import StepResult
from megalign.trainer.guard import TrainingStopped
from megalign.trainer.preference_watch import LengthBias, MarginCollapse


def falling(step: int, *, nats_a_step: float, loss_falls: bool = True) -> StepResult:
    """A run whose chosen answers lose `nats_a_step`, at beta .1 and log p of -100 at first."""
    metrics = {"rewards/chosen": -0.1 * nats_a_step * step, "logps/chosen": -100 - nats_a_step * step}
    return StepResult(0.69 - 0.002 * step if loss_falls else 0.69, 100, metrics)


@pytest.mark.parametrize("has_reference", [True, False])
def test_a_falling_chosen_answer_under_a_falling_loss_is_explained_once(has_reference: bool):
    watch = MarginCollapse(0.1, has_reference=has_reference)
    said = [(step, line) for step in range(1, 120) for line in watch.observe(step, falling(step, nats_a_step=0.1))[1]]
    assert len(said) == 1
    step, line = said[0]
    assert 40 <= step < 60
    assert "chosen answers become less likely" in line and "difference of the two answers" in line and "dpo.loss=rpo" in line


@pytest.mark.parametrize(
    "steps", [[falling(s, nats_a_step=-0.1) for s in range(1, 120)], [falling(s, nats_a_step=0.1, loss_falls=False) for s in range(1, 120)]], ids=["rising", "flat loss"]
)
def test_it_is_silent_otherwise(steps: list[StepResult]):
    watch = MarginCollapse(0.1, has_reference=True)
    assert not any(watch.observe(number, step)[1] for number, step in enumerate(steps, 1))


def test_it_stops_the_run_if_asked():
    watch = MarginCollapse(0.1, has_reference=True, stop=True)
    with pytest.raises(TrainingStopped, match="less likely.*dpo.on_collapse=warn"):
        for step in range(1, 120):
            watch.observe(step, falling(step, nats_a_step=0.1))


def steps_of_pairs(correlation: float, seed: int = 0) -> list[StepResult]:
    """Steps of 16 pairs whose margins and length differences correlate so."""
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(60):
        longer = draw.normal(5, 20, 16)
        margin = 0.3 + 0.1 * (correlation * (longer - 5) / 20 + np.sqrt(1 - correlation**2) * draw.normal(size=16))
        metrics = {"rewards/margins": margin.mean(), "_longer": longer.mean(), "_margin*margin": (margin**2).mean()}
        metrics |= {"_longer*longer": (longer**2).mean(), "_margin*longer": (margin * longer).mean()}
        found.append(StepResult(0.6, 100, metrics))
    return found


@pytest.mark.parametrize("correlation, warned", [(0.8, "longer is better"), (-0.8, "shorter is better"), (0.0, None), (0.2, None)])
def test_rewards_that_follow_length(correlation: float, warned: str | None):
    watch = LengthBias(16)
    said, last = [], 0.0
    for number, step in enumerate(steps_of_pairs(correlation), 1):
        metrics, lines = watch.observe(number, step)
        last = metrics["rewards/length_correlation"]
        said += lines
    assert last == pytest.approx(correlation, abs=3 / np.sqrt(16 * 20))
    assert [warned in line for line in said] == [True] if warned else not said


def test_the_correlation_is_that_of_the_pairs():
    draw = np.random.default_rng(1)
    margin, longer = draw.normal(size=8), draw.normal(size=8)
    metrics = {"rewards/margins": margin.mean(), "_longer": longer.mean(), "_margin*margin": (margin**2).mean()}
    metrics |= {"_longer*longer": (longer**2).mean(), "_margin*longer": (margin * longer).mean()}
    found, _ = LengthBias(8).observe(1, StepResult(0.6, 100, metrics))
    assert found["rewards/length_correlation"] == pytest.approx(np.corrcoef(margin, longer)[0, 1])


def test_a_resumed_watch_goes_on_where_it_stood():
    whole, half = MarginCollapse(0.1, has_reference=True), MarginCollapse(0.1, has_reference=True)
    lengths, rest = LengthBias(16), LengthBias(16)
    rows = steps_of_pairs(0.8)
    fired: list[list[int]] = [[], []]
    for step in range(1, 60):
        if step == 30:
            half = MarginCollapse(0.1, has_reference=True)
            half.load_state_dict(whole.state_dict())
            rest = LengthBias(16)
            rest.load_state_dict(lengths.state_dict())
        for index, watch in enumerate((whole, half)):
            fired[index] += [step] * len(watch.observe(step, falling(step, nats_a_step=0.1))[1])
        if step < 30:
            lengths.observe(step, rows[step])
        else:
            assert lengths.observe(step, rows[step]) == rest.observe(step, rows[step])
    assert fired[0] == fired[1] and len(fired[0]) == 1

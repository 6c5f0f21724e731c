"""The guards fire on what they are for, stay silent otherwise, and remember across a resume."""

import json
import math
import pickle

import pytest
import torch

from megalign.trainer.guard import (
    ClipAlarm,
    SpikeGuard,
    TrainingStopped,
    describe_non_finite,
    expert_collapse,
)


def test_a_loss_beyond_the_factor_is_a_spike_and_one_at_it_is_not():
    guard = SpikeGuard(3.0, window=4)
    assert [guard.observe(2.0) for _ in range(4)] == [None] * 4
    assert guard.observe(6.0) is None  # exactly 3 x 2.0; the mean becomes (2 + 2 + 2 + 6) / 4 = 3
    message = guard.observe(9.1)
    assert message is not None and "9.1" in message and "train.spike_factor = 3" in message


def test_a_spike_does_not_raise_the_mean_that_judges_the_next():
    guard = SpikeGuard(2.0, window=4)
    for _ in range(4):
        guard.observe(1.0)
    assert all(guard.observe(2.5) for _ in range(10))


def test_spikes_wait_for_half_a_window_and_for_a_positive_mean():
    guard = SpikeGuard(2.0, window=10)
    assert [guard.observe(loss) for loss in (0.1, 50.0)] == [None, None]
    negative = SpikeGuard(2.0, window=2)
    assert [negative.observe(loss) for loss in (-1.0, -1.0, -0.5, 0.5)] == [None] * 4


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_non_finite_loss_fires_at_once_and_leaves_the_mean_alone(loss):
    guard = SpikeGuard(2.0, window=4)
    assert str(loss) in (guard.observe(loss) or "")
    assert guard.state_dict() == {"losses": []}


def test_always_clipped_fires_past_95_of_100_steps_and_once():
    alarm = ClipAlarm(1.0)
    norms = [0.5] * 5 + [1.5] * 200  # after step 100: 95 of the last 100 clipped; after 101: 96
    fired = [step for step, norm in enumerate(norms, start=1) if alarm.observe(norm)]
    assert fired == [101]


def test_the_clip_alarm_is_armed_again_after_calm_steps():
    alarm = ClipAlarm(1.0, window=10, share=0.5)
    norms = [2.0] * 10 + [0.1] * 10 + [2.0] * 10
    assert [step for step, norm in enumerate(norms, start=1) if alarm.observe(norm)] == [10, 26]


def test_no_clipping_no_alarm():
    at_the_clip, off = ClipAlarm(1.0), ClipAlarm(0.0)
    assert not any(at_the_clip.observe(1.0) or off.observe(1e9) for _ in range(300))


def test_a_resumed_guard_fires_where_the_uninterrupted_one_does():
    losses = [1.0 + 0.01 * step for step in range(30)] + [9.0, 1.4, 9.0]
    norms = [2.0 if step > 3 else 0.1 for step in range(130)]

    def fire_steps(make, values, cut):
        guard, steps = make(), []
        for step, value in enumerate(values):
            if step == cut:
                state = json.loads(json.dumps(guard.state_dict()))  # what a checkpoint's meta.json can hold
                guard = make()
                guard.load_state_dict(state)
            if guard.observe(value):
                steps.append(step)
        return steps

    for make, values in ((lambda: SpikeGuard(2.0, 20), losses), (lambda: ClipAlarm(1.0), norms)):
        whole = fire_steps(make, values, cut=-1)
        assert whole and all(fire_steps(make, values, cut) == whole for cut in (1, 15, 31, 101, 120))


def test_one_hot_routing_fires_and_names_layer_shares_and_fix():
    even = [0.25] * 4
    message = expert_collapse([even, [0.0, 1.0, 0.0, 0.0], even])
    assert message is not None
    for part in (
        "MoE layer 1",
        "3 of 4 experts",
        "largest 100.00%",
        "1.0 experts do the work",
        "moe_aux_loss_coeff",
    ):
        assert part in message
    assert expert_collapse([even, [0.4, 0.3, 0.2, 0.1]]) is None


def test_top_2_collapse_and_a_single_starved_expert_fire_too():
    assert "2.0 experts do the work" in (expert_collapse([[0.5, 0.5] + [0.0] * 6]) or "")
    below, above = 0.09 / 4, 0.11 / 4
    assert expert_collapse([[below] + [(1 - below) / 3] * 3]) is not None
    assert expert_collapse([[above] + [(1 - above) / 3] * 3]) is None


def test_the_worst_layer_is_reported():
    message = expert_collapse([[0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.4, 0.3, 0.3, 0.0]])
    assert message is not None and message.startswith("MoE layer 1") and "3 layers are affected" in message


def test_collapse_is_not_judged_where_it_cannot_be():
    assert (
        expert_collapse([]) is None
        and expert_collapse([[1.0]]) is None
        and expert_collapse([[0.0, 0.0]]) is None
    )
    few = [[3, 1, 0, 0]]
    assert expert_collapse(few) is not None
    assert expert_collapse(few, assignments=79) is None and expert_collapse(few, assignments=80) is not None


def test_non_finite_gradients_are_named_and_counted():
    bad = torch.zeros(2, 3)
    bad[0, 2], bad[1, 0], bad[1, 1] = math.nan, math.inf, -math.inf
    lines = describe_non_finite([("good", torch.ones(3)), ("layers.1.router.weight", bad), ("frozen", None)])
    assert lines == ["layers.1.router.weight: 1 NaN, 2 infinite of 6 values, first at [0, 2]"]


def test_training_stopped_says_where_why_and_what_to_do_also_after_pickling():
    stopped = TrainingStopped(
        "the loss is nan", step=7, microbatch=2, parameter="w", fix="lower optimizer.lr"
    )
    for error in (stopped, pickle.loads(pickle.dumps(stopped))):
        assert str(error) == (
            "training stopped at step 7, microbatch 2, parameter w: the loss is nan; lower optimizer.lr"
        )
        assert (error.cause, error.step, error.microbatch, error.parameter) == ("the loss is nan", 7, 2, "w")
    assert str(TrainingStopped("spike", step=1)) == "training stopped at step 1: spike"


@pytest.mark.parametrize("factor, window", [(1.0, 10), (2.0, 1)])
def test_a_guard_that_could_never_judge_is_refused(factor, window):
    with pytest.raises(ValueError):
        SpikeGuard(factor, window)

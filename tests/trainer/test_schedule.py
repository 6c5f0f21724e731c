"""Learning-rate schedules against the numbers of the requirements and against transformers."""

from typing import Any

import pytest
import torch
import transformers

from megalign.trainer.schedule import learning_rate


def test_cosine_with_warmup_has_its_golden_values():
    rate = {step: learning_rate(step, peak=1.0, warmup=10, total=100) for step in (0, 5, 10, 55, 100, 500)}
    assert rate == pytest.approx({0: 0.0, 5: 0.5, 10: 1.0, 55: 0.5, 100: 0.0, 500: 0.0}, abs=1e-15)


ORACLES = {
    "cosine": lambda opt, w, t, c: transformers.get_cosine_schedule_with_warmup(opt, w, t),
    "linear": lambda opt, w, t, c: transformers.get_linear_schedule_with_warmup(opt, w, t),
    "constant": lambda opt, w, t, c: transformers.get_constant_schedule_with_warmup(opt, w),
    "cosine_with_restarts": lambda opt, w, t, c: (
        transformers.get_cosine_with_hard_restarts_schedule_with_warmup(opt, w, t, num_cycles=c)
    ),
}


@pytest.mark.parametrize("style", ORACLES)
@pytest.mark.parametrize(
    "warmup, total, cycles", [(10, 100, 1), (0, 37, 3), (7, 53, 2), (1, 2, 1), (0, 1, 1), (5, 5, 2)]
)
def test_every_style_equals_transformers(style, warmup, total, cycles):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    oracle = ORACLES[style](optimizer, warmup, total, cycles)
    for step in range(total + (warmup < total)):  # past the end transformers' cosine rises again; ours stays
        ours = learning_rate(step, peak=3e-4, warmup=warmup, total=total, style=style, cycles=cycles)
        assert ours == pytest.approx(oracle.get_last_lr()[0], rel=1e-12, abs=1e-18), (style, step)
        optimizer.step()
        oracle.step()


@pytest.mark.parametrize("style, theirs", [("linear", "linear"), ("cosine", "cosine"), ("minus_sqrt", "1-sqrt")])
def test_warmup_stable_decay_equals_transformers(style, theirs):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    oracle = transformers.get_wsd_schedule(optimizer, 7, 15, 60, decay_type=theirs)
    for step in range(61):
        ours = learning_rate(step, peak=3e-4, warmup=7, total=60, style="wsd", wsd_decay_steps=15, wsd_decay_style=style)
        assert ours == pytest.approx(oracle.get_last_lr()[0], rel=1e-12, abs=1e-18), (style, step)
        optimizer.step()
        oracle.step()


def test_warmup_stable_decay_equals_megatron():
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    optimizer: Any = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    for style in ("exponential", "minus_sqrt", "linear", "cosine"):
        oracle = OptimizerParamScheduler(
            optimizer, init_lr=0.0, max_lr=2.0, min_lr=0.2, lr_warmup_steps=6, lr_decay_steps=50, lr_decay_style="WSD", start_wd=0, end_wd=0,
            wd_incr_steps=1, wd_incr_style="constant", wsd_decay_steps=12, lr_wsd_decay_style=style, use_checkpoint_opt_param_scheduler=False,
        )  # fmt: skip
        for step in range(51):
            ours = learning_rate(step, peak=2.0, minimum=0.2, warmup=6, total=50, style="wsd", wsd_decay_steps=12, wsd_decay_style=style)
            assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12), (style, step)
            oracle.step(1)


def test_the_floor_replaces_zero_after_warmup_only():
    def rate(step, style):
        return learning_rate(step, peak=1.0, minimum=0.1, warmup=10, total=110, style=style)

    assert rate(0, "cosine") == 0.0 and rate(5, "linear") == 0.5
    assert rate(60, "cosine") == pytest.approx(0.55) and rate(60, "linear") == pytest.approx(0.55)
    assert rate(110, "cosine") == rate(10**6, "linear") == 0.1
    assert rate(110, "constant") == 1.0


def test_restarts_return_to_the_peak():
    rates = [
        learning_rate(s, peak=2.0, total=90, style="cosine_with_restarts", cycles=3) for s in (0, 15, 30, 60)
    ]
    assert rates == pytest.approx([2.0, 1.0, 2.0, 2.0])


@pytest.mark.parametrize(
    "wrong, field",
    [
        ({"step": -1}, "step = -1"),
        ({"warmup": 101}, "optimizer.lr_warmup_steps = 101"),
        ({"minimum": 2.0}, "optimizer.min_lr = 2.0"),
        ({"style": "polynomial"}, "optimizer.lr_decay_style = 'polynomial'"),
        ({"cycles": 0}, "optimizer.lr_num_cycles = 0"),
        ({"style": "wsd"}, "optimizer.lr_wsd_decay_steps = 0"),
        ({"style": "wsd", "warmup": 40, "wsd_decay_steps": 61}, "optimizer.lr_wsd_decay_steps = 61"),
        ({"style": "wsd", "wsd_decay_steps": 9, "wsd_decay_style": "log"}, "optimizer.lr_wsd_decay_style = 'log'"),
    ],
)
def test_wrong_arguments_are_named(wrong, field):
    arguments = {"step": 3, "peak": 1.0, "total": 100} | wrong
    with pytest.raises(ValueError, match=field):
        learning_rate(arguments.pop("step"), **arguments)

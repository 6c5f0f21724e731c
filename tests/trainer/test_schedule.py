"""Learning-rate schedules against the numbers of the requirements and against transformers."""

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
    ],
)
def test_wrong_arguments_are_named(wrong, field):
    arguments = {"step": 3, "peak": 1.0, "total": 100} | wrong
    with pytest.raises(ValueError, match=field):
        learning_rate(arguments.pop("step"), **arguments)

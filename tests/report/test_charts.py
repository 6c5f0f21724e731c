"""Numbers on their way into drawings: thinning, smoothing, axes, expert load, findings, spelling."""

import math
import re

import pytest
from fake_run import make_run

from megalign.report import format as spell
from megalign.report.axes import BOTTOM, LEFT, RIGHT, TOP, nice_ticks
from megalign.report.curves import BUCKETS, build_charts, smooth
from megalign.report.experts import build_expert_load
from megalign.report.findings import findings
from megalign.report.run_folder import RunRecord, read_run
from megalign.report.svg import Curve, line_chart


def train(tmp_path, **columns):
    """A run whose train rows hold these columns."""
    length = len(next(iter(columns.values())))
    rows = [{"step": i + 1} | {name: column[i] for name, column in columns.items()} for i in range(length)]
    return RunRecord(tmp_path, train=rows)


def test_a_long_curve_keeps_its_mean_and_its_spike(tmp_path):
    losses = [2.0] * 5000
    losses[1234] = 50.0
    chart = build_charts(train(tmp_path, loss=losses))[0]
    raw, calm = chart.legend
    assert len(raw.xs) == BUCKETS and raw.xs[-1] == 5000 and max(y for y in raw.high if y) == 50.0
    assert max(y for y in raw.ys if y) == pytest.approx(2 + 48 / (5000 / BUCKETS), rel=0.05)
    assert set(raw.low) == {2.0} and str(chart.svg).count('class="band c1"') == 1
    assert calm.name == "loss, smoothed" and not calm.low


def test_smoothing_is_centred_and_steps_over_gaps():
    line = [3.0 * i for i in range(20)]
    assert smooth(list(line), 7) == pytest.approx(line)  # a straight line has no lag
    assert smooth([1.0, None, 4.0], 3) == [1.0, None, 4.0]
    assert smooth([0.0, 0.0, 9.0, None, 3.0], 5)[2] == pytest.approx(12 / 4)


def test_points_land_where_the_axes_say():
    chart = line_chart("t", [Curve("y", 1, [0, 50, 100], [2.0, 1.0, 4.0])], from_zero=True)
    assert chart is not None
    path = re.search(r'class="line c1" d="M([^"]+)"', chart.svg)
    assert path is not None
    points = [tuple(map(float, point.split())) for point in path[1].split("L")]
    assert [x for x, _ in points] == [LEFT, (LEFT + 508 - RIGHT) / 2, 508 - RIGHT]
    bottom, tall = 220 - BOTTOM, 220 - TOP - BOTTOM
    assert [y for _, y in points] == pytest.approx([bottom - tall * y / 4.24 for y in (2, 1, 4)], abs=0.06)
    assert chart.data["curves"][0]["texts"] == ["2.000", "1.000", "4.000"]


def test_gaps_break_the_line_and_lone_points_are_dots():
    chart = line_chart("t", [Curve("y", 1, [1, 2, 3, 4, 5], [1.0, 2.0, None, 3.0, None])])
    assert chart is not None
    assert str(chart.svg).count("<circle") == 1
    assert re.findall(r'class="line c1" d="([ML])[^ML]+([ML])[^ML]+"', chart.svg) == [("M", "L")]
    assert line_chart("t", [Curve("y", 1, [1], [None])]) is None


def test_values_over_many_decades_get_a_logarithmic_axis():
    chart = line_chart("t", [Curve("y", 1, [1, 2, 3], [0.01, 1.0, 100.0])])
    assert chart is not None
    low, middle, high = chart.data["curves"][0]["tops"]
    assert middle == pytest.approx((low + high) / 2, abs=0.11) and "1.000e+02" not in chart.svg


@pytest.mark.parametrize("low, high", [(0, 1), (0.93, 0.97), (-3, 8), (1, 20000), (1e-9, 3e-9), (0, 0.001)])
def test_ticks_are_round_few_and_inside(low, high):
    ticks = nice_ticks(low, high, 6)
    assert 3 <= len(ticks) <= 7 and low - 1e-12 <= ticks[0] and ticks[-1] <= high * (1 + 1e-9)
    step = ticks[1] - ticks[0]
    assert min(abs(step / 10 ** math.floor(math.log10(step) + 1e-9) - factor) for factor in (1, 2, 5)) < 1e-6


def test_the_axis_labels_carry_no_idle_zeros(tmp_path):
    run = train(tmp_path, learning_rate=[0.0, 1e-3], tokens_per_second=[0.0, 20000.0])
    svg = "".join(chart.svg for chart in build_charts(run))
    assert (
        ">8e-4<" in svg and ">15 k<" in svg and ">5 k<" in svg and ".00" not in re.sub(r"<svg[^>]*>", "", svg)
    )


def test_few_experts_are_bars_with_the_fair_line(tmp_path):
    load = build_expert_load(train(tmp_path, expert_load=[[[0.5, 0.5], [0.98, 0.02]]] * 3).train)
    assert load is not None and not load.heat
    assert (load.starved, load.experts, load.records, load.steps) == (1, 2, 3, (1, 3))
    assert (load.smallest, load.largest) == (pytest.approx(0.04), pytest.approx(1.96))
    assert load.svg.count('class="bar"') == 3 and load.svg.count('class="starved"') == 1
    assert load.svg.count('class="reference"') == 2 and "2.0 % to 98.0 %" in load.svg


def test_layers_have_their_numbers_in_the_model(tmp_path):
    """Leading dense layers have no load; prediction modules stand behind the last layer."""
    for experts, tag in ((4, "Layer 3</text>"), (64, '"end">3</text>')):
        rows = train(tmp_path, expert_load=[[[1 / experts] * experts] * 2], expert_layers=[[3, 5]]).train
        load = build_expert_load(rows)
        assert load is not None and load.layers == [3, 5] and load.heat == (experts == 64)
        assert tag in load.svg and tag.replace("3", "5") in load.svg and tag.replace("3", "0") not in load.svg


def test_starved_is_measured_against_the_fair_share(tmp_path):
    load = build_expert_load(train(tmp_path, expert_load=[[[0.08, 0.02, 0.4, 0.5]]]).train)
    assert (
        load is not None and load.starved == 1 and load.svg.count('class="starved"') == 1
    )  # 0.32 and 0.08 of 1/4


def test_many_experts_are_a_heat_map_of_the_mean_of_the_last_records(tmp_path):
    flat = [[1 / 64] * 64]
    tilted = [[2 / 64] + [0.0] + [1 / 64] * 62]
    load = build_expert_load(train(tmp_path, expert_load=[tilted] * 8 + [flat] * 5 + [tilted] * 5).train)
    assert load is not None and load.heat and load.records == 10
    assert load.data == [[150, 50] + [100] * 62]  # hundredths of the fair share
    assert "<title>" not in load.svg and 'class="h3"' in load.svg


def test_expert_records_of_another_shape_or_without_tokens_are_left_out(tmp_path):
    loads = [[[1.0, 0.0]], None, [[0.0, 0.0, 0.0]], [[0.2, 0.4, 0.4]]]
    load = build_expert_load(train(tmp_path, expert_load=loads).train)
    assert load is not None and load.records == 1 and load.experts == 3
    assert build_expert_load([]) is None


def test_findings_name_overfitting_clipping_cutting_and_non_finite_losses(tmp_path):
    run = read_run(make_run(tmp_path / "run", overfit=True))
    run.train[6]["loss"] = None
    for row in run.train[-100:]:
        row["grad_norm"] = 1.5
    run.data["train"]["truncated"] = 400
    text = "\n".join(findings(run))
    for part in (
        "not finite in 1 step(s), first at step 7",
        "the model memorises",
        "100 % of the last 100",
        "403 of 4,988",
    ):
        assert part in text
    assert "still fell" not in text


def test_findings_name_ranks_that_wait(tmp_path):
    run = read_run(make_run(tmp_path / "run"))
    for idle, balanced, expected in ((0.2, False, True), (0.2, True, False), (0.04, False, False)):
        run.data["train"]["distribution"] = {"balanced": balanced, "dealt": {"padding_share": 0.0, "idle_share": idle}}
        assert ("wait 20 % of their time" in "\n".join(findings(run))) == expected


def test_findings_see_a_loss_that_still_falls_and_a_calm_one(tmp_path):
    falling = train(tmp_path, loss=[10 - 0.02 * i for i in range(400)])
    assert ["still fell" in line for line in findings(falling)] == [True]
    assert findings(train(tmp_path, loss=[2.0] * 400)) == []


def test_of_two_rows_for_a_step_the_later_one_counts(tmp_path):
    rows = '{"kind":"train","step":2,"loss":1}\n{"kind":"train","step":1,"loss":2}\n{"kind":"train","step":2,"loss":3}\n'
    (tmp_path / "metrics.jsonl").write_text(rows)
    assert [(row["step"], row["loss"]) for row in read_run(tmp_path).train] == [(1, 2), (2, 3)]


@pytest.mark.parametrize(
    "value, text",
    [
        (0, "0"),
        (9999, "9,999"),
        (10_000, "10.0 k"),
        (999_999, "1.00 M"),
        (1_234_567, "1.23 M"),
        (30.53e9, "30.5 G"),
    ]
    + [(None, "–"), (math.nan, "–"), (-12_345, "-12.3 k"), (123_456, "123 k"), (2.5, "2.5")],
)
def test_counts_are_spelled(value, text):
    assert spell.count(value) == text


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.0421, "42 ms"),
        (12.34, "12.3 s"),
        (200, "3 min 20 s"),
        (3900, "1 h 05 min"),
        (183_600, "2 d 3 h"),
        (None, "–"),
    ]
    + [(59.96, "60.0 s"), (3599.7, "1 h 00 min")],
)
def test_durations_are_spelled(seconds, text):
    assert spell.duration(seconds) == text


def test_numbers_rates_and_shares_are_spelled():
    assert [spell.number(x) for x in (2.34567, 0.012345, 1234.5, 0, 1.2e-7)] == [
        "2.346", "0.01235", "1,234", "0.000", "1.2e-07",
    ]  # fmt: skip
    assert [spell.rate(x) for x in (3e-4, 0.0, 1e-10, None)] == ["3.00e-4", "0", "1.00e-10", "–"]
    assert spell.percent(0.3125) == "31.2 %" and spell.percent(1, 0) == "100 %"

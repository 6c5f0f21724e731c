"""Which curves a run has: metrics thinned to what a screen can show, one chart a quantity."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from megalign.report.format import compact, duration, number, percent, rate
from megalign.report.run_folder import Row, RunRecord
from megalign.report.svg import Chart, Curve, Kind, line_chart

BUCKETS = 260  # points a curve: finer than a pixel pair at the width of the page, and a small file

# key, title, spelling, whether the axis starts at zero; in the order of the page
SMALL_CHARTS: tuple[tuple[str, str, Callable[[float], str], bool], ...] = (
    ("learning_rate", "Learning rate", rate, True),
    ("grad_norm", "Gradient norm before clipping", number, False),
    ("tokens_per_second", "Tokens per second", compact, True),
    ("mfu", "Model FLOPs utilisation", percent, True),
    ("mtp_1_loss", "Loss of the first prediction module", number, False),
    ("load_balancing_loss", "Load-balancing loss", number, False),
    ("z_loss", "Router z-loss", number, False),
    ("dropped_tokens", "Assignments dropped for capacity", compact, True),
    ("step_time", "Time per step", duration, True),
    ("rewards/accuracies", "Pairs ranked as judged", percent, True),
    ("accuracy", "Pairs ranked as judged", percent, True),
    ("margin", "Margin of the better answer", number, False),
    ("mean_reward", "Mean reward", number, False),
    ("logps/chosen", "log p of chosen answers", number, False),
    ("logps/drift", "Distance from the reference, nats an answer", number, False),
    ("divergence", "Divergence from the teacher", number, True),
    ("kl", "KL of policy from reference, estimated", number, True),
    ("rewards/length_correlation", "Correlation of margin and length difference", number, False),
)


def build_charts(run: RunRecord) -> list[Chart]:
    """The charts that this run has numbers for, the loss first."""
    charts = [_loss_chart(run), _rewards_chart(run), _scores_chart(run)]
    clip = run.section("optimizer").get("clip_grad")
    for key, title, spell, from_zero in SMALL_CHARTS:
        if key == "dropped_tokens" and not any(row.get(key) for row in run.train):
            continue
        curve = _thinned(run.train, key, title.lower(), 1)
        lines = [(clip, f"clip {clip:g}")] if key == "grad_norm" and clip else []
        charts.append(line_chart(title, [curve], spell=spell, from_zero=from_zero, lines=lines))
    charts.append(_balance_chart(run))
    return [chart for chart in charts if chart is not None]


def values(rows: list[Row], key: str) -> tuple[list[int], list[float | None]]:
    """Steps and values of the rows that have `key`; what is no number is None."""
    rows = [row for row in rows if key in row]
    numbers = (int, float)
    return [row["step"] for row in rows], [
        float(row[key]) if isinstance(row[key], numbers) else None for row in rows
    ]


def smooth(ys: list[float | None], window: int) -> list[float | None]:
    """Centred moving average over `window` values: it does not lag behind a falling loss, as a running one does.

    Towards the ends the window shrinks symmetrically; gaps stay gaps and count for nothing.
    """
    sums, counts = [0.0], [0]
    for y in ys:
        sums.append(sums[-1] + (y or 0.0))
        counts.append(counts[-1] + (y is not None))
    out: list[float | None] = []
    for index, y in enumerate(ys):
        reach = min(window // 2, index, len(ys) - 1 - index)
        start, end = index - reach, index + reach + 1
        out.append(None if y is None else (sums[end] - sums[start]) / (counts[end] - counts[start]))
    return out


def _loss_chart(run: RunRecord) -> Chart | None:
    raw = _thinned(run.train, "loss", "loss", 1, kind="faint")
    curves = [raw]
    steps, losses = values(run.train, "loss")
    if len(steps) >= 40:
        calm = smooth(losses, window=max(5, len(steps) // 25))
        rows = [{"step": step, "calm": y} for step, y in zip(steps, calm)]
        curves.append(_thinned(rows, "calm", "loss, smoothed", 1, band=False))
    else:
        curves = [_thinned(run.train, "loss", "loss", 1)]
    eval_steps, eval_losses = values(run.evals, "eval_loss")
    if len(eval_steps) > BUCKETS:
        curves.append(_thinned(run.evals, "eval_loss", "eval loss", 2))
    else:
        curves.append(Curve("eval loss", 2, eval_steps, eval_losses, "dots"))
    evaluated = [(step, y) for step, y in zip(eval_steps, eval_losses) if y is not None]
    best = min(evaluated, key=lambda point: point[1], default=None)
    marks = [
        (row["step"], row["event"])
        for row in run.events
        if row["event"] in ("resume", "stop") and row["step"] is not None
    ]
    return line_chart("Loss", curves, wide=True, marks=marks, ring=best)


def _rewards_chart(run: RunRecord) -> Chart | None:
    """Implicit rewards of preference optimisation: a chosen curve that falls is the thing to look for."""
    names = (("rewards/margins", "margin", 1), ("rewards/chosen", "chosen", 2), ("rewards/rejected", "rejected", 3))
    return line_chart("Rewards", [_thinned(run.train, key, name, colour) for key, name, colour in names])


def _scores_chart(run: RunRecord) -> Chart | None:
    """Of best-of-n, by rounds."""
    names = (("score/mean", "all answers", 1), ("score/best_of_n", "best of n", 2), ("score/held_out", "held-out prompts, greedy", 3))
    return line_chart("Score of the scorer, by rounds", [_thinned(run.train, key, name, colour) for key, name, colour in names])


def _balance_chart(run: RunRecord) -> Chart | None:
    """Largest and smallest share of an expert over all MoE layers, in units of the fair share 1/E."""
    rows = []
    for row in run.train:
        layers = [
            layer for layer in row.get("expert_load") or [] if layer and None not in layer and sum(layer) > 0
        ]
        if layers:
            fair = [[share * len(layer) / sum(layer) for share in layer] for layer in layers]
            rows.append(
                {"step": row["step"], "largest": max(map(max, fair)), "smallest": min(map(min, fair))}
            )
    curves = [_thinned(rows, "largest", "busiest expert", 2), _thinned(rows, "smallest", "idlest expert", 1)]
    return line_chart(
        "Expert load, times the fair share",
        curves,
        from_zero=True,
        lines=[(1.0, "fair share")] if rows else [],
    )


def _thinned(
    rows: list[Row], key: str, name: str, colour: int, kind: Kind = "line", band: bool = True
) -> Curve:
    """At most `BUCKETS` points: the mean of each bucket of rows, with its extremes as a band."""
    steps, ys = values(rows, key)
    if len(steps) <= BUCKETS:
        return Curve(name, colour, steps, ys, kind)
    edges = [round(index * len(steps) / BUCKETS) for index in range(BUCKETS + 1)]
    xs, means, low, high = [], [], [], []
    for start, end in pairwise(edges):
        known = [y for y in ys[start:end] if y is not None]
        xs.append(steps[end - 1])
        means.append(sum(known) / len(known) if known else None)
        low.append(min(known, default=None))
        high.append(max(known, default=None))
    return Curve(name, colour, xs, means, kind, low if band else (), high if band else ())

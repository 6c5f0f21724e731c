"""Line charts as inline SVG: drawn here, coloured by the page's CSS, made hoverable by report.js.

Colours are CSS classes (`c1` to `c4`), so one drawing serves light, dark and print. Numbers that the
tooltip needs are returned beside the drawing as plain lists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from markupsafe import Markup, escape

from megalign.report.axes import BOTTOM, LEFT, RIGHT, TOP, Plot, grid, short, value_range
from megalign.report.format import number

Kind = Literal["line", "faint", "dots"]


@dataclass(frozen=True)
class Curve:
    """One line of a chart. `ys` may hold None (a gap); `low` and `high` draw a band behind the line."""

    name: str
    colour: int
    xs: Sequence[float]
    ys: Sequence[float | None]
    kind: Kind = "line"
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()


@dataclass(frozen=True)
class Chart:
    """A drawing, its legend, and what report.js shows on hover."""

    title: str
    svg: Markup
    legend: list[Curve]
    data: dict[str, Any]


def line_chart(
    title: str,
    curves: list[Curve],
    *,
    spell: Callable[[float], str] = number,
    wide: bool = False,
    from_zero: bool = False,
    lines: Sequence[tuple[float, str]] = (),
    marks: Sequence[tuple[float, str]] = (),
    ring: tuple[float, float] | None = None,
) -> Chart | None:
    """Chart over steps, or None if there is nothing to draw.

    spell: how a value is written. lines: (value, label), dashed horizontals. marks: (step, label), dashed
    verticals. ring: (step, value), a circle around one point. A logarithmic axis is taken where positive
    values span more than a factor of 200.
    """
    curves = [curve for curve in curves if any(y is not None for y in curve.ys)]
    if not curves:
        return None
    values = [y for curve in curves for ys in (curve.ys, curve.low, curve.high) for y in ys if y is not None]
    values += [value for value, _ in lines]
    log = min(values) > 0 and max(values) > 200 * min(values) and not from_zero
    xs = [x for curve in curves for x in curve.xs]
    plot = Plot(
        width=1040 if wide else 508,
        height=320 if wide else 220,
        x=(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1),
        y=value_range(values, log, from_zero),
        log=log,
    )
    parts = [grid(plot, spell)]
    parts += [_horizontal(plot, value, label) for value, label in lines]
    parts += [_vertical(plot, step, label) for step, label in marks if plot.x[0] <= step <= plot.x[1]]
    parts += [_curve(plot, curve) for curve in curves]
    if ring is not None:
        parts.append(
            f'<circle class="ring" cx="{short(plot.at_x(ring[0]))}" cy="{short(plot.at_y(ring[1]))}" r="6"/>'
        )
    svg = (
        f'<svg viewBox="0 0 {plot.width} {plot.height}" role="img" tabindex="0" '
        f'aria-label="{escape(_sentence(title, curves[0], spell))}">{"".join(parts)}<g class="cursor"></g></svg>'
    )
    bounds = {"left": LEFT, "right": plot.width - RIGHT, "top": TOP, "bottom": plot.height - BOTTOM}
    data = bounds | {
        "x": plot.x,
        "curves": [
            {
                "name": curve.name,
                "colour": curve.colour,
                "xs": list(curve.xs),
                "tops": [None if y is None else round(plot.at_y(y), 1) for y in curve.ys],
                "texts": [None if y is None else spell(y) for y in curve.ys],
            }
            for curve in curves
        ],
    }
    return Chart(title, Markup(svg), curves, data)


def _horizontal(plot: Plot, value: float, label: str) -> str:
    top, right = short(plot.at_y(value)), plot.width - RIGHT
    return (
        f'<path class="reference" d="M{LEFT} {top}H{right}"/>'
        f'<text x="{right}" y="{top}" dy="-.4em" class="end note">{escape(label)}</text>'
    )


def _vertical(plot: Plot, step: float, label: str) -> str:
    at = short(plot.at_x(step))
    side, shift = ("end", -4) if plot.at_x(step) > 0.8 * plot.width else ("", 4)
    return (
        f'<path class="reference" d="M{at} {TOP}V{plot.height - BOTTOM}"/>'
        f'<text x="{at}" y="{TOP}" dx="{shift}" dy=".8em" class="note {side}">{escape(label)}</text>'
    )


def _curve(plot: Plot, curve: Curve) -> str:
    points = [(x, y) for x, y in zip(curve.xs, curve.ys) if y is not None]
    parts = []
    if curve.low:
        band = [
            (x, a, b) for x, a, b in zip(curve.xs, curve.low, curve.high) if a is not None and b is not None
        ]
        there = _path(plot, [(x, high) for x, _, high in band])
        back = _path(plot, [(x, low) for x, low, _ in reversed(band)])
        if len(band) > 1:
            parts.append(f'<path class="band c{curve.colour}" d="{there}L{back[1:]}Z"/>')
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(curve.xs, curve.ys):
        if y is None:
            runs.append([])
        else:
            runs[-1].append((x, y))
    path = "".join(_path(plot, run) for run in runs if len(run) > 1)
    if path:
        parts.append(f'<path class="{curve.kind} c{curve.colour}" d="{path}"/>')
    # Dots for sparse values, and for values with gaps on both sides, which no line shows.
    dots = points if curve.kind == "dots" else [run[0] for run in runs if len(run) == 1]
    parts += [
        f'<circle class="dot c{curve.colour}" cx="{short(plot.at_x(x))}" cy="{short(plot.at_y(y))}" r="3"/>'
        for x, y in dots
    ]
    return "".join(parts)


def _path(plot: Plot, points: list[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{short(plot.at_x(x))} {short(plot.at_y(y))}" for x, y in points)


def _sentence(title: str, curve: Curve, spell: Callable[[float], str]) -> str:
    """What the chart says, for readers who do not see it."""
    points = [(x, y) for x, y in zip(curve.xs, curve.ys) if y is not None]
    (first, start), (last, end) = points[0], points[-1]
    low, high = min(points, key=lambda point: point[1]), max(points, key=lambda point: point[1])
    return (
        f"{title}: {curve.name} {spell(start)} at step {first:,.0f}, {spell(end)} at step {last:,.0f}; "
        f"lowest {spell(low[1])} at step {low[0]:,.0f}, highest {spell(high[1])} at step {high[0]:,.0f}"
    )

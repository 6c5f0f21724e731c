"""Several line charts as one SVG file that stands alone: for a page of docs/, or beside a table."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import escape

from megalign.report.svg import Curve, line_chart

WIDTH, HEIGHT, GAP = 508, 220, 12
STYLE = """<style>
svg { font: 12px system-ui, sans-serif; background: #fff; } text { fill: #555; } path { fill: none; }
.mid { text-anchor: middle; } .end { text-anchor: end; } .name { fill: #222; font-weight: 600; } .grid { stroke: #e6e6e6; } .axis { stroke: #999; }
.c1 { stroke: #2a6fdb; } .c2 { stroke: #d9480f; } .c3 { stroke: #2b8a3e; } .c4 { stroke: #862e9c; } .c1, .c2, .c3, .c4 { stroke-width: 1.8; }
.band.c1 { fill: #2a6fdb; } .band.c2 { fill: #d9480f; } .band.c3 { fill: #2b8a3e; } .band.c4 { fill: #862e9c; }
.dot { stroke: none; } .reference { stroke: #999; stroke-dasharray: 3 3; } .band { stroke: none; opacity: .15; }
</style>"""


def sheet(title: str, charts: Sequence[tuple[str, Sequence[Curve]]], *, from_zero: bool = False) -> str:
    """Charts, each with its name and its curves, two a row. Raises ValueError for one without a value."""
    parts = []
    for i, (name, curves) in enumerate(charts):
        chart = line_chart(name, list(curves), from_zero=from_zero)
        if chart is None:
            raise ValueError(f"chart {name!r} has no values")
        drawing = str(chart.svg).replace("<svg", f'<svg width="{WIDTH}" height="{HEIGHT}"', 1)  # a nested one would fill the page
        legend = "".join(
            f'<path class="c{curve.colour}" d="M{10 + 110 * n},24h22"/><text x="{38 + 110 * n}" y="28">{escape(curve.name)}</text>' for n, curve in enumerate(curves)
        )
        x, y = i % 2 * (WIDTH + GAP), i // 2 * (HEIGHT + 48)
        parts.append(f'<g transform="translate({x},{y})"><text class="name" x="10" y="12">{escape(name)}</text>{legend}<g transform="translate(0,32)">{drawing}</g></g>')
    rows = -(-len(charts) // 2)
    size = f"0 0 {(2 if len(charts) > 1 else 1) * (WIDTH + GAP) - GAP} {rows * (HEIGHT + 48)}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" role="img" aria-label="{escape(title)}">{STYLE}{"".join(parts)}</svg>\n'

"""Expert load of each MoE layer: bars where they are few, a heat map where they are many."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

from markupsafe import Markup, escape

from megalign.report.format import percent
from megalign.report.run_folder import Row

AVERAGED = 10  # the last so many records; one step of a small batch says little
MOST_BARS, MOST_PANELS = 32, 12
STARVED = 0.1  # of the fair share 1/E
# Upper bounds of the heat map's colours h0 to h6, in units of the fair share.
HEAT = (0.1, 0.5, 0.8, 1.25, 2.0, 4.0)
HEAT_LABELS = ("< 0.1", "0.1–0.5", "0.5–0.8", "0.8–1.25", "1.25–2", "2–4", "≥ 4")


@dataclass(frozen=True)
class ExpertLoad:
    """What the report says about expert load; `data` feeds the heat map's tooltip."""

    svg: Markup
    heat: bool
    steps: tuple[int, int]
    records: int
    experts: int
    starved: int
    smallest: float  # times the fair share
    largest: float
    data: list[list[int]]
    layers: list[int]  # their numbers in the model


def build_expert_load(train: list[Row]) -> ExpertLoad | None:
    """Mean load of the last records that have the last one's shape; None for a dense model."""
    records = [(row["step"], row["expert_load"]) for row in train if _is_load(row.get("expert_load"))]
    if not records:
        return None
    shape = [len(layer) for layer in records[-1][1]]
    records = [record for record in records if [len(layer) for layer in record[1]] == shape][-AVERAGED:]
    layers = [_mean_shares([load[index] for _, load in records]) for index in range(len(shape))]
    ratios = [[share * len(layer) for share in layer] for layer in layers]
    last = next(row for row in reversed(train) if _is_load(row.get("expert_load")))
    numbers = last.get("expert_layers") or list(range(len(shape)))  # runs of before it was logged had no dense layers
    heat = max(shape) > MOST_BARS or len(shape) > MOST_PANELS
    return ExpertLoad(
        svg=_heat_map(ratios, numbers) if heat else _bars(layers, numbers),
        heat=heat,
        steps=(records[0][0], records[-1][0]),
        records=len(records),
        experts=max(shape),
        starved=sum(ratio < STARVED for row in ratios for ratio in row),
        smallest=min(map(min, ratios)),
        largest=max(map(max, ratios)),
        data=[[round(100 * ratio) for ratio in row] for row in ratios] if heat else [],
        layers=numbers,
    )


def _is_load(load: Any) -> bool:
    return bool(load) and all(layer and None not in layer and sum(layer) > 0 for layer in load)


def _mean_shares(loads: list[list[float]]) -> list[float]:
    columns = list(zip(*([share / sum(load) for share in load] for load in loads)))
    return [sum(column) / len(column) for column in columns]


def _bars(layers: list[list[float]], numbers: list[int]) -> Markup:
    """One panel a layer on a common scale, with the line at 1/E."""
    width, height, base = 245, 128, 106
    highest = max(map(max, layers))
    panels = []
    for index, shares in zip(numbers, layers, strict=True):
        pitch = (width - 12) / len(shares)
        fair = 1 / len(shares)
        bars = []
        for expert, share in enumerate(shares):
            tall = max(2.5, share / highest * 82)
            bars.append(
                f'<rect class="{"starved" if share < STARVED * fair else "bar"}" x="{6 + expert * pitch:.1f}" '
                f'y="{base - tall:.1f}" width="{max(1.0, pitch * 0.78):.1f}" height="{tall:.1f}" rx="1.5">'
                f"<title>expert {expert}: {percent(share)}, {share / fair:.2f} x 1/E</title></rect>"
            )
        line = base - fair / highest * 82
        span = f"{percent(min(shares))} to {percent(max(shares))}"
        panels.append(
            f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(f"MoE layer {index}: {span}")}">'
            f'<text x="6" y="13" class="strong">Layer {index}</text>'
            f'<text x="{width - 6}" y="13" class="end">{escape(span)}</text>{"".join(bars)}'
            f'<path class="axis" d="M6 {base}H{width - 6}"/><path class="reference" d="M6 {line:.1f}H{width - 6}"/>'
            f'<text x="6" y="{base + 15}">expert 0</text>'
            f'<text x="{width - 6}" y="{base + 15}" class="end">{len(shares) - 1}</text></svg>'
        )
    return Markup('<div class="panels">' + "".join(panels) + "</div>")


def _heat_map(ratios: list[list[float]], numbers: list[int]) -> Markup:
    """Rows are layers, columns experts. All cells of a colour are one path: a large model stays a small file."""
    left, right, top, tall = 34, 110, 20, 14 if len(ratios) <= 40 else 9
    wide = (1040 - left - right) / max(map(len, ratios))
    cells: list[list[str]] = [[] for _ in HEAT_LABELS]
    labels = []
    for layer, row in enumerate(ratios):
        middle = top + (layer + 0.5) * tall
        colours = [sum(ratio >= bound for bound in HEAT) for ratio in row]
        expert = 0
        for colour, run in groupby(colours):  # neighbours of one colour are one stroke
            length = len(list(run))
            cells[colour].append(f"M{left + expert * wide:.1f} {middle:g}h{length * wide:.1f}")
            expert += length
        if layer % (1 if tall > 10 else 4) == 0:
            labels.append(f'<text x="{left - 8}" y="{middle:g}" dy=".32em" class="end">{numbers[layer]}</text>')
            labels.append(
                f'<text x="{1040 - right + 8}" y="{middle:g}" dy=".32em">'
                f"{min(row):.2f} to {max(row):.2f}</text>"
            )
    paths = "".join(
        f'<path class="h{colour}" stroke-width="{tall - 1}" d="{"".join(path)}"/>'
        for colour, path in enumerate(cells)
        if path
    )
    height = top + len(ratios) * tall + 6
    geometry = f'data-left="{left}" data-top="{top}" data-tall="{tall}" data-wide="{wide:.3f}"'
    return Markup(
        f'<svg id="heat" {geometry} viewBox="0 0 1040 {height}" role="img" aria-label="Expert load by MoE layer '
        f'(rows) and expert (columns), in units of the fair share"><text x="{left}" y="12">experts 0 to '
        f'{max(map(len, ratios)) - 1}</text><text x="{1040 - right + 8}" y="12">min to max</text>'
        f"{paths}{''.join(labels)}</svg>"
    )

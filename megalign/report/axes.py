"""From values to places: the plot area of a chart, its ranges, ticks and grid."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from markupsafe import escape

LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 30  # margins around the plot, in units of the viewBox


@dataclass(frozen=True)
class Plot:
    """Maps values to the viewBox."""

    width: int
    height: int
    x: tuple[float, float]
    y: tuple[float, float]
    log: bool

    def at_x(self, x: float) -> float:
        first, last = self.x
        return LEFT + (x - first) / (last - first) * (self.width - LEFT - RIGHT)

    def at_y(self, y: float) -> float:
        low, high = (math.log10(bound) for bound in self.y) if self.log else self.y
        share = ((math.log10(y) if self.log else y) - low) / (high - low)
        return self.height - BOTTOM - share * (self.height - TOP - BOTTOM)


def nice_ticks(low: float, high: float, most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten inside [low, high], at most `most` + 1 of them."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = max(1, len(powers) // 6)
    return [10.0**power for power in powers if power % every == 0 and low <= 10.0**power <= high]


def value_range(values: list[float], log: bool, from_zero: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return low / 1.3, high * 1.3
    if from_zero:
        low = min(low, 0.0)
    if high == low:
        margin = abs(high) * 0.1 or 1.0
        return low - (0 if from_zero and low == 0 else margin), high + margin
    margin = 0.06 * (high - low)
    return (low if from_zero and low == 0 else low - margin), high + margin


def grid(plot: Plot, spell: Callable[[float], str]) -> str:
    right, bottom = plot.width - RIGHT, plot.height - BOTTOM
    parts = []
    for y in _log_ticks(*plot.y) if plot.log else nice_ticks(*plot.y, 6):
        top = short(plot.at_y(y))
        parts.append(f'<path class="grid" d="M{LEFT} {top}H{right}"/>')
        parts.append(
            f'<text x="{LEFT - 8}" y="{top}" dy=".32em" class="end">{escape(_tick(y, spell))}</text>'
        )
    for x in nice_ticks(*plot.x, 10 if plot.width > 600 else 6):
        if x.is_integer():  # steps
            at = short(plot.at_x(x))
            parts.append(f'<path class="grid" d="M{at} {bottom}v4"/>')
            parts.append(f'<text x="{at}" y="{bottom + 17}" class="mid">{x:,.0f}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{right}"/>')
    return "".join(parts)


def _tick(value: float, spell: Callable[[float], str]) -> str:
    """The value as in the tooltip without idle zeros: 2 rather than 2.000, 8e-4 rather than 8.00e-4."""
    if value == 0:
        return "0"
    return re.sub(r"\.(\d*?)0+(?!\d)", lambda found: f".{found[1]}".rstrip("."), spell(value))


def short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")

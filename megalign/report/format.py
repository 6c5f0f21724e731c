"""Numbers as people read them: one spelling for the console and the report."""

from __future__ import annotations

import math
from typing import Any

MISSING = "–"
_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def _absent(value: Any) -> bool:
    """None, NaN, an infinity, or whatever else a damaged file holds in place of a number."""
    return not isinstance(value, (int, float)) or not math.isfinite(value)


def count(value: float | None, exact_below: int = 10_000) -> str:
    """9,999 exactly; from `exact_below` on three digits and a prefix: 12.3 k, 1.24 M, 30.5 G."""
    if value is None or _absent(value):
        return MISSING
    if abs(value) < exact_below:
        return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.4g}"
    for index, (size, prefix) in enumerate(_PREFIXES):
        if abs(value) >= size:
            digits = float(f"{value / size:.3g}")
            if abs(digits) >= 1000 and index > 0:  # 999,999 is 1 M, not 1000 k
                digits, prefix = digits / 1000, _PREFIXES[index - 1][1]
            whole = 1 if abs(digits) < 1 else len(str(int(abs(digits))))
            return f"{digits:.{max(0, 3 - whole)}f} {prefix}"
    return MISSING


def number(value: float | None, digits: int = 4) -> str:
    """Significant digits: 2.346, 0.0125, 1.2e-07."""
    if value is None or _absent(value):
        return MISSING
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}g}"
    decimals = digits - 1 - (math.floor(math.log10(abs(value))) if value else 0)
    return f"{value:,.{max(0, decimals)}f}"


def compact(value: float | None) -> str:
    """As `count`, but with prefixes from 1,000 on: 5.00 k."""
    return count(value, exact_below=1000)


def rate(value: float | None) -> str:
    """A learning rate: 3.00e-4."""
    if value is None or _absent(value):
        return MISSING
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}" if value else "0"


def percent(share: float | None, digits: int = 1) -> str:
    """A share of 0 to 1: 31.2 %."""
    return MISSING if share is None or _absent(share) else f"{100 * share:.{digits}f} %"


def duration(seconds: float | None) -> str:
    """The two largest units: 840 ms, 12.3 s, 3 min 20 s, 1 h 05 min, 2 d 3 h."""
    if seconds is None or _absent(seconds):
        return MISSING
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"

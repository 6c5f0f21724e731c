"""`labels` of a row: what is known of an answer, by name."""

from __future__ import annotations

import math
from typing import Any

from megalign.data.rows import Unusable

OBSERVED = ".observed"
USER = "user."


def read_labels(value: dict[str, Any]) -> tuple[tuple[str, float], ...]:
    """`{"quality": 4, "continues": true, "gap": {"time": 2.5, "observed": false}}` as (name, number); null is unknown.

    A time becomes two: `gap` and `gap.observed`. Raises Unusable for what is no number.
    """
    found: list[tuple[str, float]] = []
    for name, label in value.items():
        if isinstance(label, dict):
            if label.get("time") is None:
                raise Unusable(f"labels.{name} has no 'time'")
            found.append((name, _number(name, label["time"])))
            found.append((name + OBSERVED, _number(name, label.get("observed", True))))
        elif label is not None:
            found.append((name, _number(name, label)))
    return tuple(found)


def read_user(value: Any) -> tuple[str | None, tuple[tuple[str, float], ...]]:
    """(id, facts) of `{"id": "u7", "tenure_days": 31, "premium": true}`, the facts as `user.tenure_days`; a text is an id alone."""
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        return str(value), ()
    if not isinstance(value, dict):
        return None, ()
    facts = tuple((USER + name, _number(f"{USER}{name}", fact)) for name, fact in value.items() if name != "id" and fact is not None)
    return (None if value.get("id") is None else str(value["id"])), facts


def _number(name: str, value: Any) -> float:
    if not isinstance(value, (bool, int, float)) or not math.isfinite(value):
        raise Unusable(f"labels.{name} is {repr(value)[:40]}, neither a number nor true or false")
    return float(value)

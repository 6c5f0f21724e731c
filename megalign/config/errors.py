"""What is wrong with a recipe: every problem at once, each with field, value, rule and fix."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

NO_VALUE: Any = ...  # the problem has no single value (a missing file, an unknown key); `...` survives pickling


@dataclass(frozen=True)
class Problem:
    """One violated rule. `field` is dotted (`train.global_batch_size`), or names the file."""

    field: str
    rule: str
    fix: str
    value: Any = NO_VALUE

    def __str__(self) -> str:
        found = "" if self.value is NO_VALUE else f"{self.field}={shown(self.value)}: "
        return f"{found}{self.rule}; {self.fix}"


class ConfigError(ValueError):
    """The recipe cannot run. `problems` holds every violated rule, the message one line for each.

    A plain string instead of problems is the message itself.
    """

    def __init__(self, problems: Iterable[Problem] | str, source: str = "the recipe"):
        self.problems = () if isinstance(problems, str) else tuple(problems)
        head = f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''} in {source}:"
        lines = [head, *(f"  - {problem}" for problem in self.problems)]
        super().__init__(problems if isinstance(problems, str) else "\n".join(lines))
        self._arguments = (problems if isinstance(problems, str) else self.problems, source)

    def __reduce__(self):  # a worker process hands it to its parent
        return ConfigError, self._arguments


def shown(value: Any) -> str:
    """A value as a recipe would write it: `null`, `true`, bare words and numbers."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return value if isinstance(value, str) and value else repr(value)


def not_a_multiple(field: str, value: int, divisor: int, what: str, otherwise: str) -> Problem:
    """`value` = quotient * `divisor` + remainder, and the two multiples beside it."""
    quotient, remainder = divmod(value, divisor)
    rule = f"must be a multiple of {what}, but {value} = {quotient} * {divisor} + {remainder}"
    near = " or ".join(str(q * divisor) for q in (quotient, quotient + 1) if q)
    return Problem(field, rule, f"set it to {near}, or {otherwise}", value)

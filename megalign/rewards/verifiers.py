"""Scorers that are functions of a row and an answer: the built-in ones, and any `module:function`.

A row is a conversation whose last message is the reference answer; the larger a score, the better the answer.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megalign.config.errors import ConfigError, Problem
from megalign.data.rows import Conversation

Scorer = Callable[[Conversation, str], float]


def exact_match(row: Conversation, answer: str) -> float:
    """1 if the answer is the reference, word for word, else 0."""
    return float(answer.split() == row.messages[-1].content.split())


def words_in_place(row: Conversation, answer: str) -> float:
    """Share of places at which answer and reference have the same word: |{i: a_i = r_i}| / max(|a|, |r|), 0 to 1."""
    said, wanted = answer.split(), row.messages[-1].content.split()
    return sum(a == b for a, b in zip(said, wanted)) / max(len(said), len(wanted), 1)


NAMED: dict[str, Scorer] = {"exact_match": exact_match, "words_in_place": words_in_place}


def load_scorer(name: str, key: str = "scorer") -> Scorer:
    """A named scorer, or the function of `module:function` (or `path/to/file.py:function`; modules of the working folder are found).

    Raises ConfigError, with `key` as the field, where there is none.
    """
    if name in NAMED:
        return NAMED[name]
    where, colon, function = name.rpartition(":")
    try:
        if not colon:
            raise ImportError("it is none of these names, and no module:function")
        found: Any = getattr(_module(where), function)
    except (ImportError, AttributeError, OSError, SyntaxError) as error:
        raise ConfigError([Problem(key, f"{error}", f"give {', '.join(NAMED)}, reward_model, or module:function with (row, answer) -> number", name)]) from None
    return found


def score_of(scorer: Scorer, row: Conversation, answer: str, name: str) -> float:
    """The score as a finite number. Raises ConfigError for anything else: a comparison with NaN would choose at random."""
    value = scorer(row, answer)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError([Problem("scorer", f"it gave {value!r} for {row.source}:{row.line}", "make it return a finite number for every answer", name)])
    return number


def _module(where: str) -> Any:
    if where.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(where).stem, where)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    return importlib.import_module(where)

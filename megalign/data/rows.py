"""Rows: what files hold before (`Conversation`, `TextRow`, `BadRow`) and after (`Example`) tokenisation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


class DataError(ValueError):
    """The data cannot be trained on; the message names the file, the line, the rule and the fix."""


@dataclass(frozen=True)
class Message:
    """One turn: who speaks (`system`, `user`, `assistant`) and what is said."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """The turns of one dialogue; `source` and `line` say where it was read."""

    messages: tuple[Message, ...]
    source: str = ""
    line: int = 0


@dataclass(frozen=True)
class TextRow:
    """Plain text."""

    text: str
    source: str = ""
    line: int = 0


@dataclass(frozen=True)
class BadRow:
    """A row that could not be used, and why."""

    source: str
    line: int
    reason: str


@dataclass(frozen=True)
class TooLong(BadRow):
    """A readable row of which nothing fits: counted as `truncated_away`, not against `max_bad_share`."""


@dataclass(frozen=True)
class Example:
    """A tokenised row. `loss_mask[t]`: token t is scored, given the tokens before it; never true at 0."""

    input_ids: np.ndarray  # [T] int32
    loss_mask: np.ndarray  # [T] bool
    messages_cut: int = 0  # trailing messages left out so that the row fits

    def __len__(self) -> int:
        return len(self.input_ids)


Row = Conversation | TextRow | BadRow

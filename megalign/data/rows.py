"""Rows: what files hold before tokenisation, and `Example`, what a row is after it.

A file's row becomes one typed row: `Conversation` and `TextRow` are trained on as they are; `PreferencePair`,
`RankedResponses`, `LabelledResponse` and `ScoredResponse` are judged answers; `VerifiableProblem`, `Prompt` and
`JudgePrompt` are questions. One that cannot be used becomes a `BadRow`, so that rows in = rows kept + bad rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np


class DataError(ValueError):
    """The data cannot be trained on; the message names the file, the line, the rule and the fix."""


@dataclass(frozen=True)
class ToolCall:
    """A function that the assistant calls; `arguments` is a JSON object in text."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Message:
    """One turn: who speaks (`system`, `user`, `assistant`, `tool`) and what is said."""

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    scored: bool = True  # of an assistant: false keeps the turn out of the loss (OpenAI's "weight": 0)
    # Alpaca's input: then `content` is the instruction, a blank line and it; that template alone sets it apart.
    input: str = field(default="", compare=False)


@dataclass(frozen=True)
class Conversation:
    """The turns of one dialogue; `source` and `line` say where it was read."""

    messages: tuple[Message, ...]
    source: str = ""
    line: int = 0
    tools: tuple[str, ...] = ()  # each the JSON text of {"type": "function", "function": {...}}


@dataclass(frozen=True)
class TextRow:
    """Plain text."""

    text: str
    source: str = ""
    line: int = 0


@dataclass(frozen=True)
class Provenance:
    """Where a judgement comes from (D30), apart from the policy, which stands with each response."""

    judge: str | None = None
    rubric: str | None = None
    time: str | None = None
    licence: str | None = None


@dataclass(frozen=True)
class Response:
    """What follows a prompt: assistant's turn, or several turns from there on (HH transcripts)."""

    messages: tuple[Message, ...]
    score: float | None = None  # the file's own scale
    rank: float | None = None  # 1 is the best
    policy: str | None = None  # the model that wrote it

    @property
    def text(self) -> str:
        """Content of the last assistant turn."""
        return next(m.content for m in reversed(self.messages) if m.role == "assistant")


@dataclass(frozen=True)
class PreferencePair:
    """Two responses to one prompt, the first preferred."""

    prompt: tuple[Message, ...]
    chosen: Response
    rejected: Response
    weight: float = 1.0
    margin: float | None = None  # how much better, on the file's own scale
    provenance: Provenance = Provenance()
    source: str = ""
    line: int = 0
    tools: tuple[str, ...] = ()
    labels: tuple[tuple[str, float], ...] = ()  # quality -> above 0: the first is better there, below: the second


@dataclass(frozen=True)
class RankedResponses:
    """Two or more responses to one prompt, best first, each with a score or a rank."""

    prompt: tuple[Message, ...]
    responses: tuple[Response, ...]
    provenance: Provenance = Provenance()
    source: str = ""
    line: int = 0

    def pairs(self) -> list[PreferencePair]:
        """Every pair that is no tie, at equal weights that sum to 1, so that a long list counts as one judgement."""
        untied = [(a, b) for a, b in combinations(self.responses, 2) if (a.score, a.rank) != (b.score, b.rank)]
        return [
            PreferencePair(
                self.prompt, better, worse, 1 / len(untied), margin(better, worse), self.provenance, self.source, self.line
            )
            for better, worse in untied
        ]


@dataclass(frozen=True)
class LabelledResponse:
    """One response, desirable or not (KTO)."""

    prompt: tuple[Message, ...]
    response: Response
    label: bool
    weight: float = 1.0
    provenance: Provenance = Provenance()
    source: str = ""
    line: int = 0


@dataclass(frozen=True)
class ScoredResponse:
    """One response with absolute scores by attribute (HelpSteer), or labels by name (turns to come, returns, ...).

    A time that may be censored is two: `gap` and `gap.observed`, 0 where the event had not come by then.
    """

    prompt: tuple[Message, ...]
    response: Response
    scores: tuple[tuple[str, float], ...]
    provenance: Provenance = Provenance()
    source: str = ""
    line: int = 0
    user: str | None = None  # who reads it; what is known of them is among the scores, as user.tenure


@dataclass(frozen=True)
class VerifiableProblem:
    """A prompt with an answer that a verifier checks: a value, or code that must pass `tests`."""

    prompt: tuple[Message, ...]
    answer: str
    solution: str | None = None  # a worked solution that ends in `answer`; for code: `answer` itself
    tests: str | None = None
    entry_point: str | None = None
    source: str = ""
    line: int = 0


@dataclass(frozen=True)
class Prompt:
    """The user's turns of a question set."""

    turns: tuple[str, ...]
    category: str | None = None
    label: str | None = None
    answer: str | None = None  # one that `label` is about (XSTest's labelled completions)
    source: str = ""
    line: int = 0


@dataclass(frozen=True)
class JudgePrompt:
    """What a judge model is asked."""

    name: str
    system: str
    template: str
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
    values: Mapping[str, float] = field(default_factory=dict)  # what is known of the row: its weight, a reference's log-prob
    shared: int = 0  # leading tokens that the example before it in a pack begins with too, none of whose labels is scored here

    def __len__(self) -> int:
        return len(self.input_ids)


class Unusable(Exception):
    """Why one row is bad."""


Judged = PreferencePair | RankedResponses | LabelledResponse | ScoredResponse
Question = VerifiableProblem | Prompt | JudgePrompt
Row = Conversation | TextRow | BadRow  # what supervised training reads
AnyRow = Row | Judged | Question
Values = Mapping[str, Any]


def margin(better: Response, worse: Response) -> float | None:
    """Difference of the scores, where both have one."""
    return better.score - worse.score if better.score is not None and worse.score is not None else None

"""What a person sees while a run goes on: a live bar on a terminal, sparse plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from megalign.report.format import count, duration, number, percent, rate

SECONDS_BETWEEN_LINES = 1.0  # a log of a fast toy run stays readable


class ProgressDisplay:
    """Shows steps, evaluations and events of a run of `total_steps`; see the module's first line."""

    def __init__(
        self,
        total_steps: int,
        *,
        log_interval: int = 1,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total_steps = total_steps
        self.log_interval = log_interval
        self.console = console or Console(highlight=False)
        self._clock = clock
        self._first: tuple[int, float] | None = None  # step and time of the first step seen here
        self._last_line = float("-inf")
        self._eval_loss: float | None = None
        self._bar: Progress | None = None
        if self.console.is_terminal:
            columns = (
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[status]}"),
            )
            self._bar = Progress(*columns, console=self.console)
            self._task = self._bar.add_task("training", total=total_steps, status="")
            self._bar.start()

    def train(self, step: int, values: dict[str, Any]) -> None:
        now = self._clock()
        first_step, since = self._first = self._first or (step, now)
        # The first step compiles and warms up; the estimate begins after it and includes evaluations.
        remaining = (
            (now - since) / (step - first_step) * (self.total_steps - step) if step > first_step else None
        )
        status = self._status(values, remaining)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, status=escape(status))
            return
        due = step % self.log_interval == 0 and now - self._last_line >= SECONDS_BETWEEN_LINES
        if due or step in (first_step, self.total_steps):
            self._last_line = now
            width = len(str(self.total_steps))
            self._print(f"step {step:>{width}}/{self.total_steps}  {status}")

    def eval(self, step: int, values: dict[str, Any]) -> None:
        self._eval_loss = values.get("eval_loss")
        best = "  (best so far)" if values.get("best") else ""
        perplexity = values.get("eval_perplexity")
        detail = f"  perplexity {number(perplexity)}" if perplexity is not None else ""
        self._print(f"step {step}  eval loss {number(self._eval_loss)}{detail}{best}")

    def event(self, step: int, event: str, message: str) -> None:
        style = "yellow" if event == "warning" else "red" if event == "stop" else "dim"
        self._print(f"step {step}  {event}: {message}", style)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _status(self, values: dict[str, Any], remaining: float | None) -> str:
        parts = [f"loss {number(values.get('loss'))}"]
        if self._eval_loss is not None:
            parts.append(f"eval {number(self._eval_loss)}")
        for key, name, spell in (
            ("grad_norm", "grad", number),
            ("learning_rate", "lr", rate),
            ("mfu", "MFU", percent),
        ):
            if values.get(key) is not None:
                parts.append(f"{name} {spell(values[key])}")
        if values.get("tokens_per_second") is not None:
            parts.append(f"{count(round(values['tokens_per_second']))} tok/s")
        if remaining is not None:
            parts.append(f"ETA {duration(remaining)}")
        return "  ".join(parts)

    def _print(self, line: str, style: str | None = None) -> None:
        self.console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)

"""The record of a run: metrics.jsonl (always), TensorBoard, and the progress line.

One rank writes; every other rank holds a `NullLogger`. `step` is the number of optimizer steps
completed, so the first line is step 1 and a checkpoint `iter_0000100` continues at 101.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console

from megalign.report.run_folder import parse_line
from megalign.trainer.progress import ProgressDisplay

SHARE_DIGITS = 5  # of expert_load: a large model has thousands of shares, and 1e-5 is far below 1/E


class NullLogger:
    """The logger of the ranks that do not write, and the interface of the one that does."""

    def train(self, step: int, **values: Any) -> None:
        """One optimizer step: loss, grad_norm, learning_rate, num_tokens, tokens_per_second, mfu (0 to 1), ..."""

    def eval(self, step: int, **values: Any) -> None:
        """One evaluation: eval_loss, eval_tokens, eval_perplexity, best."""

    def event(self, step: int, event: str, message: str) -> None:
        """Something that happened: event is resume, checkpoint, warning or stop."""

    def close(self) -> None:
        """Release files and the terminal; harmless when repeated."""

    def __enter__(self):
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class MetricsLogger(NullLogger):
    """Writes `output/metrics.jsonl`, `output/tensorboard/` and progress; use it as a context manager.

    `resume_step` None starts a new record. A number continues one: lines of `train` and `eval` past it
    belong to steps that will be done again and are removed, as are torn lines; events stay, they
    happened. Each line is one `write` to a file opened for appending, so `kill -9` costs at most the
    line being written.
    """

    def __init__(
        self,
        output: Path,
        *,
        total_steps: int,
        quiet: bool = False,
        tensorboard: bool = True,
        log_interval: int = 1,
        resume_step: int | None = None,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        output.mkdir(parents=True, exist_ok=True)
        path = output / "metrics.jsonl"
        _cut_back(path, resume_step)
        self._file = path.open("ab", buffering=0)
        self._step = resume_step or 0
        self._board = _open_tensorboard(output / "tensorboard", resume_step) if tensorboard else None
        self._display = (
            None
            if quiet
            else ProgressDisplay(total_steps, log_interval=log_interval, console=console, clock=clock)
        )

    def train(self, step: int, **values: Any) -> None:
        values = self._record("train", step, values)
        if self._display is not None:
            self._display.train(step, values)

    def eval(self, step: int, **values: Any) -> None:
        values = self._record("eval", step, values)
        if self._display is not None:
            self._display.eval(step, values)

    def event(self, step: int, event: str, message: str) -> None:
        self._record("event", step, {"event": event, "message": message})
        if self._board is not None:
            self._board.add_text(f"event/{event}", message, step)
        if self._display is not None:
            self._display.event(step, event, message)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """An error that ends the run becomes its last event, so that the record says why it ends."""
        if error is not None and not self._file.closed:
            with contextlib.suppress(OSError):  # the disk may be the reason
                self.event(getattr(error, "step", self._step), "stop", str(error) or type(error).__name__)
        self.close()

    def close(self) -> None:
        self._file.close()
        if self._display is not None:
            self._display.close()
        if self._board is not None:
            self._board.close()
            self._board = None

    def _record(self, kind: str, step: int, values: dict[str, Any]) -> dict[str, Any]:
        self._step = step
        values = {name: _plain(value) for name, value in values.items()}
        if values.get("expert_load"):
            values["expert_load"] = [
                [None if share is None else round(share, SHARE_DIGITS) for share in layer]
                for layer in values["expert_load"]
            ]
        row = {"kind": kind, "step": step, **values, "time": round(time.time(), 3)}
        self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    self._board.add_scalar(f"{kind}/{name.removeprefix('eval_')}", value, step)
        return values


def _plain(value: Any) -> Any:
    """JSON's own types: tensors and arrays become numbers or lists, NaN and infinities null."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _cut_back(path: Path, resume_step: int | None) -> None:
    """Leave in `path` what a run that continues at `resume_step` has behind it; replaced atomically."""
    if not path.exists():
        return
    kept = []
    if resume_step is not None:
        for line in path.read_bytes().splitlines(keepends=True):
            row = parse_line(line)
            if row is None or not line.endswith(b"\n"):
                continue
            if row.get("kind") == "event" or row.get("step", 0) <= resume_step:
                kept.append(line)
    shortened = path.with_suffix(".jsonl.tmp")
    with shortened.open("wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(shortened, path)


def _open_tensorboard(folder: Path, resume_step: int | None) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # slow to import, and not every run wants it

    # purge_step hides what was written before for steps that are done again (a new record: for all).
    return SummaryWriter(str(folder), purge_step=0 if resume_step is None else resume_step + 1)

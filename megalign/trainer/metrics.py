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
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console

from megalign.parallel.local import is_echo
from megalign.report.run_folder import parse_line
from megalign.trainer.progress import ProgressDisplay
from megalign.trainer.trackers import Tracker

SHARE_DIGITS = 5  # of expert_load: a large model has thousands of shares, and 1e-5 is far below 1/E


class NullLogger:
    """The logger of the ranks that do not write, and the interface of the one that does."""

    def train(self, step: int, **values: Any) -> None:
        """One optimizer step: loss, grad_norm, learning_rate, num_tokens, tokens_per_second, mfu (0 to 1), ..."""

    def eval(self, step: int, **values: Any) -> None:
        """One evaluation: eval_loss, eval_tokens, eval_perplexity, best."""

    def timers(self, step: int, **values: Any) -> None:
        """Seconds of every rank since the last such row: slowest, times_median, ranks (see timers.py)."""

    def event(self, step: int, event: str, message: str) -> None:
        """Something that happened: event is resume, checkpoint, warning, placement, audit, straggler, timers, profile or stop."""

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
    line being written. A disk that fails costs nothing once it works again: lines wait in memory.
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
        trackers: Mapping[str, Tracker] | None = None,
    ) -> None:
        output.mkdir(parents=True, exist_ok=True)
        path = output / "metrics.jsonl"
        _cut_back(path, resume_step)
        self._file = path.open("ab", buffering=0)
        self._trackers = dict(trackers or {})
        self._failed = False
        self._unwritten = b""
        self._complaints: set[str] = set()
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

    def timers(self, step: int, **values: Any) -> None:
        self._record("timers", step, values)

    def event(self, step: int, event: str, message: str) -> None:
        self._record("event", step, {"event": event, "message": message})
        self._on_board("add_text", f"event/{event}", message, step)
        if self._display is not None:
            self._display.event(step, event, message)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """An error that ends the run becomes its last event, so that the record says why it ends."""
        self._failed = error is not None
        if error is not None and not self._file.closed:
            with contextlib.suppress(OSError):  # the disk may be the reason
                message = str(error) or type(error).__name__
                if is_echo(message):  # gloo's words for it name only a socket
                    message = "another rank went away; logs/ and the launcher's message say which"
                self.event(getattr(error, "step", self._step), "stop", message)
        self.close()

    def close(self) -> None:
        if not self._file.closed:
            self._write(b"")
            self._file.close()
        if self._display is not None:
            self._display.close()
        for tracker in self._trackers.values():
            with contextlib.suppress(Exception):
                tracker.close(self._failed)
        self._trackers = {}
        board, self._board = self._board, None
        if board is not None:
            with contextlib.suppress(OSError):
                board.close()

    def _record(self, kind: str, step: int, values: dict[str, Any]) -> dict[str, Any]:
        self._step = step
        values = {name: _plain(value) for name, value in values.items()}
        if values.get("expert_load"):
            values["expert_load"] = [
                [None if share is None else round(share, SHARE_DIGITS) for share in layer]
                for layer in values["expert_load"]
            ]
        row = {"kind": kind, "step": step, **values, "time": round(time.time(), 3)}
        self._write(json.dumps(row, allow_nan=False).encode() + b"\n")
        scalars = {f"{kind}/{name.removeprefix('eval_')}": value for name, value in values.items() if isinstance(value, (int, float)) and not isinstance(value, bool)}
        for name, value in scalars.items():
            self._on_board("add_scalar", name, value, step)
        for name in list(self._trackers) if scalars else []:
            try:
                self._trackers[name].log(scalars, step)
            except Exception as error:  # a dashboard is no reason to end a run
                self._complain(f"{name} cannot be told ({error})")
        return values

    def _write(self, line: bytes) -> None:
        """Append what a full or failing disk did not take before, then `line`: a record is no reason to end a run."""
        self._unwritten += line
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            self._complain(f"metrics.jsonl cannot be written ({error.strerror}); lines wait in memory")

    def _on_board(self, method: str, *arguments: Any) -> None:
        """Call the TensorBoard writer, until its disk fails."""
        if self._board is None:
            return
        try:
            getattr(self._board, method)(*arguments)
        except OSError as error:
            self._board = None
            self._complain(f"TensorBoard's file cannot be written ({error.strerror}); nothing more goes there")

    def _complain(self, message: str) -> None:
        if message not in self._complaints and self._display is not None:
            self._display.event(self._step, "warning", message)
        self._complaints.add(message)


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

"""Stopping when a scheduler asks: SIGTERM or SIGUSR1 -> the step is finished, a checkpoint saved, exit code 75.

SLURM sends a signal of choice before the time limit, Kubernetes and cloud machines send SIGTERM before they take
the machine away. The signal may reach one rank or all, at different moments: the ranks agree after each step
(`any_rank`), so that all save the same one. Ctrl-C (SIGINT) is left alone: it stops at once, without a checkpoint.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: "the user is invited to retry"
MARKER = "MEGALIGN_PREEMPTED_FILE"  # torchrun turns every exit code into 1; what started it looks into this file


class Preempted(Exception):
    """The run was asked to stop, and its state up to `step` is saved: the same command continues it."""

    def __init__(self, step: int, cause: str):
        super().__init__(step, cause)
        self.step, self.cause = step, cause

    def __str__(self) -> str:
        return f"stopped by {self.cause} after step {self.step}, which is saved: the same command continues from there"


class StopSignals:
    """While entered, SIGTERM and SIGUSR1 are remembered instead of ending the process.

    Before and after they act as they always do, and nothing is lost by it: there is no step to save. Off the main
    thread, where Python has no signals, nothing is ever remembered.
    """

    def __init__(self) -> None:
        self.received: str | None = None  # name of the first signal
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            # Launchers signal those that are still leaving, into the last moments of the interpreter: let them leave.
            signal.signal(number, signal.SIG_IGN if isinstance(error, Preempted) else handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        # Repeated signals change nothing: SLURM sends SIGTERM at the time limit, perhaps in the middle of our save.
        self.received = self.received or signal.Signals(number).name


def leave_marker(stop: Preempted) -> None:
    """Tell whoever set $MEGALIGN_PREEMPTED_FILE that this world stopped on request."""
    if os.environ.get(MARKER):
        Path(os.environ[MARKER]).write_text(f"{stop.step}\n")


def preempted_step() -> int | None:
    """The step that the ranks started by this process saved before they left; None if they were not preempted."""
    path = Path(os.environ.get(MARKER, ""))
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text else None

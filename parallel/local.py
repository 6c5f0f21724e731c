"""Starting the ranks of a layout on this machine, through torch's elastic launcher.

Rank 0 keeps the terminal; the output of the others goes to `logs/`. A rank that fails leaves its error in a
file for the launcher, which shows the error that came FIRST, once: the others mostly report that their
neighbour went away.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalign.parallel.preempt import MARKER, PREEMPTED, preempted_step

LAUNCHER = "MEGALIGN_LAUNCHER_PID"
RUN_ID = "megalign"  # by which a rank knows that `launch` started it, and not a torchrun of the user's
# What a rank reports when another one died.
_ECHO = re.compile(
    r"closed by peer|Connection reset|Broken pipe|Socket Timeout|Connection refused|NCCL (error|communicator)|"
    r"failed to (recv|send)|DistNetworkError|DistStoreError|Application timeout|Read error|remote process",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class RankFailure:
    """Why a rank ended. `expected`: the message is meant for the user and needs no traceback."""

    rank: int
    exit_code: int
    time: float
    message: str
    traceback: str
    expected: bool

    @property
    def is_echo(self) -> bool:
        """True if this rank only lost its neighbour, or was stopped by the launcher."""
        return self.exit_code == -signal.SIGTERM or is_echo(self.message)


def is_echo(message: str) -> bool:
    """True if an error says no more than that another rank went away."""
    return bool(_ECHO.search(message))


def launch(arguments: Sequence[str], ranks: int, log_folder: Path) -> int:
    """Run `python -m megalign ARGUMENTS` as `ranks` local ranks; return the exit code for the shell.

    0: all ranks ended well. 1: a rank failed, its error is on stderr. 75: SIGTERM or SIGUSR1, and the ranks have
    saved the step they were at. 130: Ctrl-C (143: SIGTERM before the first step). All ranks are gone.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    log_folder.mkdir(parents=True, exist_ok=True)
    marker = log_folder / "preempted"
    marker.unlink(missing_ok=True)
    os.environ[MARKER] = str(marker)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # we say what failed, once
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // ranks)))
    os.environ[LAUNCHER] = str(os.getpid())
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=RUN_ID,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(str(log_folder), redirects={rank: Std.ALL for rank in range(1, ranks)}),
    )
    if hasattr(config, "signals_to_handle"):  # torch without it does not hand SIGUSR1 on
        config.signals_to_handle += ",SIGUSR1"
    try:
        elastic_launch(config, sys.executable)("-m", "megalign", *arguments)
    except ChildFailedError as error:
        if preempted_step() is not None:
            return PREEMPTED
        failures = [_failure(rank, failure) for rank, failure in error.failures.items()]
        print(describe_failure(failures, ranks, log_folder), file=sys.stderr)
        return 1
    except (SignalException, KeyboardInterrupt) as error:
        if preempted_step() is not None:
            return PREEMPTED
        number = getattr(error, "sigval", signal.SIGINT)
        print("\nstopped; all ranks have ended. A training run continues from the last complete checkpoint when repeated.", file=sys.stderr)
        return 128 + int(number)
    return 0


def describe_failure(failures: Iterable[RankFailure], ranks: int, log_folder: Path) -> str:
    """The error of the rank that failed first, for people."""
    first = min(failures, key=lambda failure: (failure.is_echo, failure.time))
    if first.expected:
        return f"error: {first.message}"
    if first.exit_code < 0:
        name = signal.Signals(-first.exit_code).name
        why = " (out of memory?)" if name == "SIGKILL" else ""
        return (
            f"error: rank {first.rank} of {ranks} was killed by {name}{why}; the other ranks were stopped. "
            f"Nothing before the last complete checkpoint is lost: the same command continues from it. Logs: {log_folder}"
        )
    return f"{first.traceback}\nerror: rank {first.rank} of {ranks} failed first: {first.message}\nlogs of the other ranks: {log_folder}"


def record_failure(error: BaseException, expected: bool, says: bool | None = None) -> None:
    """Leave this rank's error for the launcher (torchelastic's error file), or print it if there is none.

    torchrun shows the file of a rank that failed, in a frame of its own; above it one rank says an expected error in one
    line. says: whether it is this one; None: if it is the first of its machine.
    """
    import time
    import traceback

    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    message = str(error) if expected else f"{type(error).__name__}: {error}"
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        print(f"error: {message}" if expected else f"{text}\nerror: {message}", file=sys.stderr, flush=True)
        return
    extra = {"py_callstack": f"error: {message}" if expected else text, "timestamp": str(int(time.time())), "expected": expected, "seconds": time.time()}
    content = json.dumps({"message": {"message": message, "extraInfo": extra}})
    try:
        Path(path).write_text(content)
    except OSError:  # the logs lie on the run's disk, which may be the one that is full
        Path(path).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            _elsewhere(os.environ.get(LAUNCHER, ""), os.environ.get("RANK", "0")).write_text(content)
    first, ours = os.environ.get("LOCAL_RANK") == "0", os.environ.get("TORCHELASTIC_RUN_ID") == RUN_ID
    if expected and not ours:
        if first if says is None else says:
            print(f"error: {message}", file=sys.stderr, flush=True)
    elif not first:  # its log; what the first rank writes is on the terminal, where `launch` says it
        print(text, file=sys.stderr, flush=True)


def end_with_launcher() -> None:
    """Have the kernel end this rank when its launcher dies, however it dies (Linux). Call it first of all."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is not None and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG; a training rank would outlive SIGTERM by a step and a save
        if os.getppid() != int(launcher):  # it died before we asked
            os._exit(1)


def _failure(rank: int, failure: Any) -> RankFailure:
    message: Any = failure.message
    extra: Mapping[str, Any] = {}
    elsewhere = _elsewhere(str(os.getpid()), str(rank))
    if elsewhere.exists():
        message = json.loads(elsewhere.read_text())["message"]
        elsewhere.unlink()
    if isinstance(message, dict):
        message, extra = message.get("message", ""), message.get("extraInfo", {})
    return RankFailure(
        rank=rank,
        exit_code=failure.exitcode,
        time=float(extra.get("seconds", failure.timestamp)),
        message=str(message),
        traceback=str(extra.get("py_callstack", "")),
        expected=bool(extra.get("expected", False)),
    )


def _elsewhere(launcher: str, rank: str) -> Path:
    """Where a rank leaves its error if it cannot leave it in the logs."""
    return Path(tempfile.gettempdir()) / f"megalign-{launcher}-rank-{rank}.error.json"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""What the training thread is doing: seconds by phase, told to the hang watch and, on CUDA, to NVTX.

    with phases("data"): ...

Megatron-core's schedule reports its parts through `config.timers`, for which `MegatronTimers` stands: forward and
backward of each microbatch become phases too. The outermost phase counts the time: the forwards of an evaluation are
`eval`. What lies between phases (waiting for other pipeline stages, mostly) is `other`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megalign.parallel.watch import Position

NAMES = ("data", "forward", "backward", "gradients", "optimizer", "eval", "checkpoint")
_OF_MEGATRON = {"forward-compute": "forward", "backward-compute": "backward", "all-grads-sync": "gradients"}


class Phases:
    """Keeps the current phase, and the seconds of each since `take`.

    synchronize: wait for the GPU at each border, for true times at the price of overlap. nvtx: push ranges for Nsight.
    """

    def __init__(self, *, synchronize: bool = False, nvtx: bool = False, clock: Callable[[], float] = time.monotonic):
        self.synchronize, self.nvtx, self.clock = synchronize and torch.cuda.is_available(), nvtx, clock
        self.step = 0
        self.watched = False
        self.profiled = False
        self.changes = 0
        self.stack: list[str] = []
        self.ranges: list[Any] = []  # of the stack's phases in a torch profile, or None
        self.seconds: dict[str, float] = {}
        self._began = 0.0

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.begin(name)
        try:
            yield
        finally:
            self.end(name)

    def begin(self, name: str) -> None:
        self.changes += 1
        self.stack.append(name)
        if self.nvtx:
            torch.cuda.nvtx.range_push(name)
        self.ranges.append(torch.profiler.record_function(name) if self.profiled else None)
        if self.ranges[-1] is not None:
            self.ranges[-1].__enter__()
        if len(self.stack) == 1:
            self._began = self._now()

    def end(self, name: str) -> None:
        if name not in self.stack:
            return
        ended = ""
        while ended != name:  # an error may have left inner phases open
            ended = self.stack.pop()
            traced = self.ranges.pop()
            if traced is not None:
                traced.__exit__(None, None, None)
            if self.nvtx:
                torch.cuda.nvtx.range_pop()
        self.changes += 1
        if not self.stack:
            self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - self._began

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        seconds, self.seconds = self.seconds, {}
        return seconds

    def position(self) -> Position:
        """For the hang watch; callable from another thread."""
        stack = self.stack[:1]
        return Position(self.step, stack[0] if stack else "between phases", self.changes, self.watched)

    def _now(self) -> float:
        if self.synchronize:
            torch.cuda.synchronize()
        return self.clock()


class MegatronTimers:
    """Stands for megatron.core.timers.Timers: `timers("forward-compute", log_level=2).start()`, later `.stop()`."""

    def __init__(self, phases: Phases):
        self.phases = phases

    def __call__(self, name: str, log_level: int | None = None) -> Any:
        return _Timer(self.phases, _OF_MEGATRON.get(name))


class _Timer:
    def __init__(self, phases: Phases, name: str | None):
        self.phases, self.name = phases, name

    def start(self, barrier: bool = False) -> None:
        if self.name:
            self.phases.begin(self.name)

    def stop(self, barrier: bool = False) -> None:
        if self.name:
            self.phases.end(self.name)

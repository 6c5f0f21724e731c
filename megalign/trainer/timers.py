"""Where each rank's time goes, and which rank the others wait for (`logging.timers`).

A rank that waits inside a collective operation is not slow, though its forward takes as long as that of the rank it
waits for. On a CPU the waiting is therefore sampled: a thread looks some 50 times a second whether the training thread
stands in a collective, and

    work = step time * (1 - share of the looks that found it waiting)

On CUDA the host runs ahead and waits for the GPU, so that a look says nothing; there `work` is the time of the phases,
between which the GPU is waited for. Collectives inside a phase then hide differences within a tensor- or
expert-parallel group; between pipeline stages and data-parallel replicas they show.
"""

from __future__ import annotations

import socket
import statistics
import sys
import threading
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megalign.parallel.grid import Grid
from megalign.parallel.watch import is_waiting
from megalign.trainer.metrics import NullLogger
from megalign.trainer.phases import NAMES, Phases

INTERVAL = 10  # steps between two looks at all ranks
STRAGGLER = 1.25  # times the median work from which a rank is named
LOOK_SECONDS = 0.02
_OUTSIDE_STEPS = ("eval", "checkpoint")


@dataclass(frozen=True)
class RankTimes:
    """Seconds of one rank: `step` and `work` a step; of the phases a step, of eval and checkpoint in all."""

    rank: int
    host: str
    step: float
    work: float
    phases: dict[str, float]


class Timers:
    """Collects `Phases` on every rank; every 10 steps and at the end, `metrics.jsonl` gets a row of kind `timers`."""

    def __init__(self, phases: Phases, grid: Grid, log: NullLogger):
        self.phases, self.grid, self.log = phases, grid, log
        self.steps, self.seconds = 0, 0.0
        self.waited = self.looks = 0
        self.named: int | None = None
        self.last: list[RankTimes] = []
        self.main = threading.main_thread().ident or 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._look, name="wait-sampler", daemon=True)
        if not torch.cuda.is_available():
            self.thread.start()

    def after_step(self, step: int, seconds: float) -> None:
        """Count a step that took `seconds`; collective every 10 steps."""
        self.steps += 1
        self.seconds += seconds
        if step % INTERVAL == 0:
            self.tell(step)

    def close(self, step: int) -> None:
        """Tell the rest, and the last word on stragglers (collective)."""
        self.stop.set()
        if self.steps:
            self.tell(step)
        if self.last:
            self.log.event(step, "timers", describe(self.last))

    def tell(self, step: int) -> None:
        """Gather all ranks' times since the last call, record them, warn of a new straggler (collective)."""
        ranks: list[Any] = [None] * self.grid.world
        dist.all_gather_object(ranks, self._mine())
        self.last = ranks
        slowest, times = straggler(ranks)
        plain = [{"rank": r.rank, "host": r.host, "step": r.step, "work": r.work, **r.phases} for r in ranks]
        self.log.timers(step, slowest=slowest, times_median=round(times, 3), ranks=plain)
        if times > STRAGGLER and slowest != self.named:
            self.log.event(step, "straggler", describe(ranks))
        self.named = slowest if times > STRAGGLER else None

    def _mine(self) -> RankTimes:
        seconds, steps = self.phases.take(), max(1, self.steps)
        each = {name: round(seconds.get(name, 0.0) / (1 if name in _OUTSIDE_STEPS else steps), 5) for name in NAMES}
        busy = sum(seconds for name, seconds in each.items() if name not in _OUTSIDE_STEPS)
        step = self.seconds / steps
        if self.looks:
            busy = step * (1 - self.waited / self.looks)
        self.steps, self.seconds, self.waited, self.looks = 0, 0.0, 0, 0
        return RankTimes(self.grid.rank, socket.gethostname(), round(step, 5), round(busy, 5), each)

    def _look(self) -> None:
        while not self.stop.wait(LOOK_SECONDS):
            if self.phases.stack[:1] in (["eval"], ["checkpoint"]):
                continue
            self.looks += 1
            self.waited += is_waiting(sys._current_frames().get(self.main))


def straggler(ranks: list[RankTimes]) -> tuple[int, float]:
    """(the rank with the most work a step, its work over the median rank's). The lower median: of two ranks, the other."""
    slowest = max(ranks, key=lambda rank: rank.work)
    median = statistics.median_low([rank.work for rank in ranks])
    return slowest.rank, slowest.work / median if median > 0 else 1.0


def describe(ranks: list[RankTimes]) -> str:
    """One line: the slowest rank against the median, and where a step goes."""
    number, times = straggler(ranks)
    slowest = next(rank for rank in ranks if rank.rank == number)
    median = statistics.median_low([rank.work for rank in ranks])
    parts = ", ".join(f"{name} {statistics.median([rank.phases[name] for rank in ranks]):.3f}" for name in NAMES if name not in _OUTSIDE_STEPS)
    return (
        f"slowest rank {number} (host {slowest.host}): {slowest.work:.3f} s of work a step, {times:.2f} times the median {median:.3f} s; "
        f"seconds a step, median over ranks: {parts}; whole step {statistics.median([rank.step for rank in ranks]):.3f}"
    )

"""What is switched on to look into a run: timers, a torch profile of some steps, a memory snapshot when memory runs out."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from megalign.config.schema import LoggingConfig
from megalign.trainer.engine import Engine
from megalign.trainer.guard import TrainingStopped
from megalign.trainer.metrics import NullLogger
from megalign.trainer.timers import Timers

HISTORY = 100_000  # allocations remembered for a snapshot


class Instruments:
    """Around the steps of a run. A context manager; files go to `folder`, one a rank.

    profile/rank_00000.json: chrome trace of `logging.profile_steps` (chrome://tracing, Perfetto).
    memory/rank_00000.pickle: allocations up to an out-of-memory error (pytorch.org/memory_viz), with
    `logging.memory_snapshot` on CUDA.
    """

    def __init__(self, engine: Engine, folder: Path, log: NullLogger):
        self.engine, self.folder, self.log = engine, folder, log
        self.config: LoggingConfig = engine.recipe.logging
        self.timers = Timers(engine.phases, engine.grid, log) if self.config.timers else None
        self.profiler: Any = None

    def __enter__(self) -> Instruments:
        if self.config.memory_snapshot and torch.cuda.is_available():
            torch.cuda.memory._record_memory_history(max_entries=HISTORY)
        return self

    def before_step(self, step: int) -> None:
        """`step`: the one that begins, counted from 1."""
        if self.config.profile_steps and step == self.config.profile_steps[0]:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self.profiler = torch.profiler.profile(activities=activities)
            self.profiler.start()
            self.engine.phases.profiled = True

    def after_step(self, step: int, seconds: float) -> None:
        """`step` has ended after `seconds`."""
        if self.timers is not None:
            self.timers.after_step(step, seconds)
        if self.config.profile_steps and step == self.config.profile_steps[1]:
            self._write_profile(step)

    def close(self, step: int) -> None:
        """The run has ended, perhaps before the last step to profile (collective)."""
        if self.timers is not None:
            self.timers.close(step)
        self._write_profile(step)

    def _write_profile(self, step: int) -> None:
        if self.profiler is None:
            return
        profiler, self.profiler = self.profiler, None
        self.engine.phases.profiled = False
        profiler.stop()
        profiler.export_chrome_trace(str(self._file("profile", "json")))
        self.log.event(step, "profile", f"traces of all ranks: {self.folder / 'profile'}")

    def _file(self, kind: str, suffix: str) -> Path:
        (self.folder / kind).mkdir(parents=True, exist_ok=True)
        return self.folder / kind / f"rank_{self.engine.grid.rank:05d}.{suffix}"

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.timers is not None:
            self.timers.stop.set()
        if isinstance(error, torch.OutOfMemoryError):
            raise self._out_of_memory(error) from error

    def _out_of_memory(self, error: BaseException) -> TrainingStopped:
        """Which rank, doing what, and what to try; with a snapshot if one is kept."""
        position, fix = self.engine.phases.position(), "lower train.micro_batch_size or data.sequence_length, or shard the model over more ranks (parallel.*)"
        if self.config.memory_snapshot and torch.cuda.is_available():
            file = self._file("memory", "pickle")
            torch.cuda.memory._dump_snapshot(str(file))
            fix += f"; what held the memory: {file} (open it at pytorch.org/memory_viz)"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return TrainingStopped(f"rank {self.engine.grid.rank} ran out of memory in {position.phase}: {reason}", position.step, fix=fix)

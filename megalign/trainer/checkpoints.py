"""The checkpoints of a run: one at a time on its way to the disk, the last few and the best few kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from megalign.parallel.checkpoint import checkpoint_name, list_checkpoints, remove
from megalign.trainer.engine import Engine
from megalign.trainer.guard import TrainingStopped
from megalign.trainer.metrics import NullLogger
from megalign.trainer.prune import checkpoints_to_remove

Evaluations = list[tuple[int, float]]  # (step, eval_loss)


class Checkpoints:
    """Saves into `folder`; with `train.async_save` while training goes on. A context manager: leaving it waits.

    `evaluations` decides which are the best; it is the caller's list and grows with the run.
    """

    def __init__(self, engine: Engine, folder: Path, log: NullLogger, extra: Callable[[Path], None]):
        """extra: called on the writing rank with each unfinished folder, to add files of its own (a tokenizer)."""
        self.engine, self.folder, self.log, self.extra = engine, folder, log, extra
        self.evaluations: Evaluations = []
        self.pending: Any = None

    def save(self, step: int, meta: dict[str, Any], evaluations: Evaluations) -> None:
        """Save `step`, after what is still on its way (collective). Raises CheckpointError on every rank."""
        self.wait()
        self.evaluations = evaluations
        self.folder.mkdir(parents=True, exist_ok=True)
        background = self.engine.recipe.train.async_save
        with self.engine.phases("checkpoint"):
            self.pending = self.engine.save(self.folder, step, meta, self.extra, background=background)
        if not background:
            self.wait()

    def poll(self) -> None:
        """Put the checkpoint in place if every rank has written its part (collective); cheap, call it every step."""
        if self.pending is not None and self.pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is on its way (collective). Raises CheckpointError on every rank."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        with self.engine.phases("checkpoint"):
            pending.finish()
        self.log.event(pending.step, "checkpoint", checkpoint_name(pending.step))
        if self.engine.grid.is_logger:
            config = self.engine.recipe.train
            for path in checkpoints_to_remove(list_checkpoints(self.folder), self.evaluations, config.keep_last, config.keep_best):
                remove(path)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """A guard stops all ranks at one step, so that they can wait together; any other error may be one rank's alone."""
        if error is None or isinstance(error, TrainingStopped):
            self.wait()

"""One run from its first log line to its report, whatever the algorithm; `megalign/sft.py` shows how it is used."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalign.config.layout import total_steps
from megalign.config.rules import check
from megalign.config.schema import Recipe
from megalign.config.size import count_parameters
from megalign.data.dataset import Dataset, build_datasets
from megalign.models.base import adapter_identity
from megalign.models.resolve import resolve_model
from megalign.parallel.init import World
from megalign.parallel.preempt import Preempted, StopSignals
from megalign.report.build import build_report
from megalign.trainer.backends import use_backends
from megalign.trainer.checkpoints import Checkpoints
from megalign.trainer.engine import Engine
from megalign.trainer.finish import finish, generation_metrics
from megalign.trainer.hang import hang_watch
from megalign.trainer.loop import fit
from megalign.trainer.metrics import NullLogger
from megalign.trainer.mfu import Speed, flops_per_token, world_peak_flops
from megalign.trainer.objective import Objective
from megalign.trainer.profile import Instruments
from megalign.trainer.run import (
    RunFolder,
    announce,
    check_identity,
    check_schedule,
    grid_of,
    identity,
    open_logger,
)
from megalign.trainer.training import Monitor, Training


@dataclass
class Algorithm:
    """What an algorithm gives to the loop."""

    objective: Objective
    monitors: Mapping[str, Monitor] = field(default_factory=dict)
    notes: Sequence[tuple[str, str]] = ()  # (event, message), said before the first step
    at_end: Callable[[int], None] | None = None  # called with the last step, on every rank, once the best weights are loaded


class Session:
    """A checked recipe with its grid, folder and data; no model yet."""

    def __init__(self, recipe: Recipe, world: World, build: Callable[[Recipe], tuple[Dataset, Dataset]], more_identity: Mapping[str, Any]):
        self.started = time.monotonic()
        self.recipe, self.world = recipe, world
        self.grid = grid_of(recipe, world)
        self.run = RunFolder(recipe, self.grid)
        self.resume_from: Path | None = self.run.open()
        self.log = NullLogger()  # until training begins
        self.train, self.validation = self.run.datasets(self.resume_from, build)
        check_schedule(recipe, total_steps(recipe, len(self.train)) or 1)
        self.identity = {**identity(recipe, self.train), **adapter_identity(recipe), **more_identity}
        if self.resume_from is not None:
            check_identity(self.resume_from, self.identity)

    @property
    def vocab_size(self) -> int:
        return self.identity["vocab_size"]

    def carry_out(self, engine: Engine, algorithm: Algorithm) -> None:
        """Train, and leave a report, also of a run that a guard stopped (collective)."""
        self.run.describe(self.train, self.validation, sys.argv)
        try:
            self._train(engine, algorithm)
        except Preempted:
            raise  # whoever sent the signal will not wait for a report
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one to hear of
                self._report()
            raise
        self._report()

    def _report(self) -> None:
        if self.recipe.logging.report and self.grid.is_logger:
            build_report(self.run.path)

    def _old_data(self) -> Dataset | None:
        """train.forgetting_data, with this run's tokenizer."""
        files, recipe = self.recipe.train.forgetting_data, self.recipe.model_copy(deep=True)
        if files is None:
            return None
        data = recipe.data
        data.train, data.validation, data.validation_rows, data.max_rows, data.mixture, data.curriculum = files, None, 0, None, None, None
        data.format, data.streaming, data.tokenizer.path = "auto", False, str(self.run.tokenizer)
        return build_datasets(recipe)[0]

    def _train(self, engine: Engine, algorithm: Algorithm) -> None:
        recipe, run, train, validation = self.recipe, self.run, self.train, self.validation
        counts = count_parameters(recipe.model, self.vocab_size)
        with open_logger(run, total_steps(recipe, len(train)) or 1, self.resume_from) as log, hang_watch(run.path / "logs" / "watch", engine):
            self.log = log
            announce(run, self.world, train, log)
            for event, message in algorithm.notes:
                log.event(0, event, message)
            with (
                Instruments(engine, run.path / "logs", log) as instruments,
                Checkpoints(engine, run.checkpoints, log, lambda folder: train.tokenizer.save(folder / "tokenizer")) as checkpoints,
                StopSignals() as stop,
            ):
                training = Training(
                    engine,
                    train,
                    validation,
                    algorithm.objective,
                    log=log,
                    checkpoints=checkpoints,
                    identity=self.identity,
                    generate=(lambda step: generation_metrics(engine, run, validation)) if recipe.train.eval_prompts else None,
                    monitors=algorithm.monitors,
                    old=self._old_data(),
                )
                flops = flops_per_token(recipe.model, counts, train.statistics, frozen=recipe.lora.rank is not None)
                speed = Speed(flops, world_peak_flops(self.world, recipe.train.precision), log)
                progress = fit(training, instruments=instruments, speed=speed, resume_from=self.resume_from, stop=stop)
            finish(engine, run, train, validation, progress, counts, log, seconds=time.monotonic() - self.started)
            if algorithm.at_end is not None:
                algorithm.at_end(progress.step)


def open_session(
    recipe: Recipe,
    world: World,
    *,
    build: Callable[[Recipe], tuple[Dataset, Dataset]] = build_datasets,
    identity: Callable[[Recipe], Mapping[str, Any]] = lambda recipe: {},
) -> Session:
    """Check the recipe, open its folder, read its data (collective).

    build: makes the training and the validation set. identity: what else a checkpoint must agree with to be continued.
    Raises ConfigError, DataError or RunError.
    """
    recipe = resolve_model(recipe)
    check(recipe, world.size)
    use_backends(recipe)
    return Session(recipe, world, build, identity(recipe))

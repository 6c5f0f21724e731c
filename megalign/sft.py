"""Supervised fine-tuning: next-token cross-entropy on the assistant's turns. `pretrain` is the same loop on text.

    L = - sum over scored tokens of log p(token | tokens before it)  /  number of scored tokens in the global batch
"""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from megalign.batch import Batch
from megalign.config.layout import total_steps
from megalign.config.rules import check
from megalign.config.schema import Recipe
from megalign.config.size import count_parameters
from megalign.data.dataset import Dataset
from megalign.losses import TokenLoss, cross_entropy_loss
from megalign.models.resolve import resolve_model
from megalign.parallel.init import World
from megalign.parallel.preempt import Preempted, StopSignals
from megalign.report.build import build_report
from megalign.trainer.checkpoints import Checkpoints
from megalign.trainer.engine import Engine
from megalign.trainer.finish import finish, generation_metrics
from megalign.trainer.hang import hang_watch
from megalign.trainer.loop import fit
from megalign.trainer.mfu import flops_per_token, world_peak_flops
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


def sft(recipe: Recipe, world: World) -> None:
    """Fine-tune as the recipe says, on every rank of the world (collective).

    Raises ConfigError, DataError, RunError, CheckpointError or TrainingStopped, each with what to do, and Preempted
    after SIGTERM or SIGUSR1, with the last step saved.
    """
    started = time.monotonic()
    recipe = resolve_model(recipe)
    check(recipe, world.size)
    grid = grid_of(recipe, world)

    run = RunFolder(recipe, grid)
    resume_from = run.open()
    train, validation = run.datasets(resume_from)
    check_schedule(recipe, total_steps(recipe, len(train)) or 1)
    this = identity(recipe, train)
    if resume_from is not None:
        check_identity(resume_from, this)

    engine = Engine(recipe, grid, this["vocab_size"])
    run.describe(train, validation, sys.argv)
    try:
        _train(engine, run, train, validation, this, resume_from, started, world)
    except Preempted:
        raise  # whoever sent the signal will not wait for a report
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to hear of
            _report(run)
        raise
    _report(run)


def _report(run: RunFolder) -> None:
    """report.html; a run that a guard stopped has one too."""
    if run.recipe.logging.report and run.grid.is_logger:
        build_report(run.path)


def _train(
    engine: Engine,
    run: RunFolder,
    train: Dataset,
    validation: Dataset,
    this: dict[str, Any],
    resume_from: Path | None,
    started: float,
    world: World,
) -> None:
    recipe = engine.recipe
    counts = count_parameters(recipe.model, this["vocab_size"])
    with open_logger(run, total_steps(recipe, len(train)) or 1, resume_from) as log, hang_watch(run.path / "logs" / "watch", engine):
        announce(run, world, train, log)
        with (
            Instruments(engine, run.path / "logs", log) as instruments,
            Checkpoints(engine, run.checkpoints, log, lambda folder: train.tokenizer.save(folder / "tokenizer")) as checkpoints,
            StopSignals() as stop,
        ):
            progress = fit(
                engine,
                train,
                validation,
                token_loss,
                log=log,
                checkpoints=checkpoints,
                instruments=instruments,
                identity=this,
                resume_from=resume_from,
                flops_per_token=flops_per_token(recipe.model, counts, train.statistics),
                peak_flops=world_peak_flops(world, recipe.train.precision),
                generate=(lambda step: generation_metrics(engine, run, validation)) if recipe.train.eval_prompts else None,
                stop=stop,
            )
        finish(engine, run, train, validation, progress, counts, log, seconds=time.monotonic() - started)


def token_loss(output: Tensor, batch: Batch) -> TokenLoss:
    """Cross-entropy of what the model's last stage returned for a microbatch."""
    logprobs, correct = output
    return cross_entropy_loss(logprobs, correct)

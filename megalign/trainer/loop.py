"""The training loop of every algorithm that descends on a fixed data set: steps, evaluation, checkpoints, guards."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megalign.data.dataset import Dataset
from megalign.data.mixture import MixtureSampler
from megalign.parallel.preempt import Preempted, StopSignals
from megalign.parallel.schedule import any_rank
from megalign.trainer.checkpoints import Checkpoints
from megalign.trainer.engine import Engine
from megalign.trainer.metrics import NullLogger
from megalign.trainer.mfu import Speed
from megalign.trainer.objective import Objective
from megalign.trainer.profile import Instruments
from megalign.trainer.training import Monitor, Progress, Training


def fit(
    engine: Engine,
    train: Dataset,
    validation: Dataset,
    objective: Objective,
    *,
    log: NullLogger,
    checkpoints: Checkpoints,
    instruments: Instruments,
    identity: dict[str, Any],
    resume_from: Path | None,
    flops_per_token: float,
    peak_flops: float,
    stop: StopSignals,
    generate: Callable[[int], dict[str, float]] | None = None,
    monitors: Mapping[str, Monitor] | None = None,
) -> Progress:
    """Train to the end of the recipe, or until a stopping rule holds; return where the run stands.

    generate: called with the step at each evaluation, on every rank; its metrics are logged with the loss.
    monitors: of the algorithm; each sees every step.

    Raises TrainingStopped (a guard) and CheckpointError (a full disk); the last complete checkpoint stays. Raises
    Preempted on every rank, with the step saved, once one of them has received a stop signal.
    """
    run = Training(
        engine, train, validation, objective, log=log, checkpoints=checkpoints, identity=identity, generate=generate, monitors=monitors
    )
    config, grid = engine.recipe.train, engine.grid
    speed = Speed(flops_per_token, peak_flops, log)
    started = time.monotonic()
    if resume_from is not None:
        run.resume(resume_from)
    engine.audit.start(run.progress.step, log)
    if run.evaluation_is_owed():
        run.evaluate()

    engine.phases.watched = True
    while run.progress.step < run.end and not run.stopped_improving():
        began = time.monotonic()
        instruments.before_step(run.progress.step + 1)
        step = run.step()
        at, seconds = run.progress.step, time.monotonic() - began
        log.train(
            at,
            loss=step.result.loss,
            learning_rate=step.learning_rate,
            grad_norm=step.result.grad_norm,
            num_tokens=run.progress.tokens,
            epoch=round(run.batches.sampler.progress, 4),
            **speed.of_step(at, step.tokens, seconds),
            **step.metrics,
            **step.routing,
        )
        instruments.after_step(at, seconds)
        checkpoints.poll()
        run.look_for_trouble(step)
        engine.audit.report(at, log)

        out_of_time = config.max_minutes is not None and any_rank(time.monotonic() - started > config.max_minutes * 60, grid)
        preempted = any_rank(stop.received is not None, grid)
        last = at == run.end or out_of_time
        # A scheduler that will kill us soon is not kept waiting by an evaluation: it is made up for on resumption.
        evaluated = not preempted and run.evaluation_is_due(last)
        if evaluated:
            run.evaluate()
        if last or preempted or run.save_is_due(evaluated):
            run.save()
        if preempted:
            checkpoints.wait()
            any_rank(False, grid)  # nobody leaves before the logging rank is done with the files
            raise Preempted(at, stop.received or "a stop signal on another rank")
        if out_of_time:
            log.event(at, "stop", f"train.max_minutes = {config.max_minutes:g} is over")
            break

    if run.saved_at != run.progress.step and run.progress.step > 0:
        run.save()
    checkpoints.wait()
    engine.audit.close(run.progress.step, log)
    instruments.close(run.progress.step)
    engine.phases.watched = False
    _say_why_it_ended(run, log)
    return run.progress


def _say_why_it_ended(run: Training, log: NullLogger) -> None:
    at, config = run.progress.step, run.config
    if isinstance(run.batches.sampler, MixtureSampler):
        log.event(at, "mixture", run.batches.sampler.describe())
    if run.stopped_improving():
        log.event(at, "stop", f"eval_loss has not improved by more than {config.early_stop_min_delta:g} in {config.early_stop_patience} evaluations")
    elif at == run.end < run.steps:
        log.event(at, "stop", f"train.stop_at_step = {run.end}; the schedule has {run.steps} steps")

"""The training loop of every algorithm that descends on a fixed data set: steps, evaluation, checkpoints, guards."""

from __future__ import annotations

import time
from pathlib import Path

from megalign.data.mixture import MixtureSampler
from megalign.parallel.preempt import Preempted, StopSignals
from megalign.parallel.schedule import any_rank
from megalign.trainer.mfu import Speed
from megalign.trainer.profile import Instruments
from megalign.trainer.training import Progress, Training


def fit(run: Training, *, instruments: Instruments, speed: Speed, resume_from: Path | None, stop: StopSignals) -> Progress:
    """Train to the end of the recipe, or until a stopping rule holds; return where the run stands.

    Raises TrainingStopped (a guard) and CheckpointError (a full disk); the last complete checkpoint stays. Raises
    Preempted on every rank, with the step saved, once one of them has received a stop signal.
    """
    engine, grid, log, checkpoints, config = run.engine, run.grid, run.log, run.checkpoints, run.config
    started = time.monotonic()
    if resume_from is not None:
        run.resume(resume_from)
    engine.audit.start(run.progress.step, log)
    if run.evaluation_is_owed():
        run.evaluate()

    engine.phases.watched = True
    while run.progress.step < run.end and not run.stopped_improving() and not run.forgets():
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
    _say_why_it_ended(run)
    return run.progress


def _say_why_it_ended(run: Training) -> None:
    at, config, log = run.progress.step, run.config, run.log
    if isinstance(run.batches.sampler, MixtureSampler):
        log.event(at, "mixture", run.batches.sampler.describe())
    if run.forgets():
        log.event(at, "stop", f"eval_old_loss has risen by {run.progress.forgotten:.4f} nats since the first evaluation, more than train.forgetting_limit({config.forgetting_limit:g}): what the model knew is being forgotten; replay of that data (5 to 20 %) holds it")
    elif run.stopped_improving():
        log.event(at, "stop", f"eval_loss has not improved by more than {config.early_stop_min_delta:g} in {config.early_stop_patience} evaluations")
    elif at == run.end < run.steps:
        log.event(at, "stop", f"train.stop_at_step = {run.end}; the schedule has {run.steps} steps")

"""The training loop of every algorithm that descends on a fixed data set: steps, evaluation, checkpoints, guards."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megalign.batch import Batch, collate, filled_tokens
from megalign.config.layout import scaled_lr, total_steps
from megalign.config.schema import Recipe, TrainConfig
from megalign.data.dataset import Dataset
from megalign.data.deal import sampler_of
from megalign.data.mixture import MixtureSampler
from megalign.parallel.grid import Grid
from megalign.parallel.preempt import Preempted, StopSignals
from megalign.parallel.schedule import any_rank
from megalign.trainer.checkpoints import Checkpoints
from megalign.trainer.engine import Engine, LossFunction, StepResult
from megalign.trainer.guard import ClipAlarm, SpikeGuard, TrainingStopped, expert_collapse
from megalign.trainer.metrics import NullLogger
from megalign.trainer.profile import Instruments
from megalign.trainer.schedule import learning_rate

EXPERT_LOAD_INTERVAL = 10  # steps between looks at the routers


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0
    tokens: int = 0  # non-padding tokens seen
    evaluations: list[tuple[int, float]] = field(default_factory=list)  # (step, eval_loss)

    @property
    def best(self) -> tuple[int, float] | None:
        """(step, eval_loss) of the best evaluation so far."""
        return min(self.evaluations, key=lambda pair: pair[1]) if self.evaluations else None

    def without_improvement(self, min_delta: float) -> int:
        """Evaluations since eval_loss last fell by more than `min_delta` nats below its mark (Keras' EarlyStopping)."""
        mark, count = math.inf, 0
        for _, loss in self.evaluations:
            mark, count = (loss, 0) if loss < mark - min_delta else (mark, count + 1)
        return count


def pads_microbatches(grid: Grid) -> bool:
    """Whether microbatches are filled up to one length, because other ranks compute on the same one."""
    return not grid.model.size == grid.context.size == grid.expert.size == 1


class Batches:
    """A data set dealt to this rank, as packed microbatches."""

    def __init__(self, dataset: Dataset, recipe: Recipe, grid: Grid, *, evaluation: bool = False, rows: int | None = None):
        self.dataset, self.recipe, self.grid = dataset, recipe, grid
        self.multiple = 2 * grid.context.size if grid.context.size > 1 else 1
        self.sampler = sampler_of(
            dataset, recipe, data_parallel_rank=grid.data.rank, data_parallel_size=grid.data.size, evaluation=evaluation, rows=rows
        )

    def next_step(self) -> tuple[list[Batch], int]:
        """Microbatches of the next step and this rank's non-padding tokens in them."""
        microbatches, tokens = [], 0
        for indices in self.sampler.next_step():
            packs = [self.dataset.rows[i] if i >= 0 else [] for i in indices]
            microbatches.append(self._collate(packs))
            tokens += sum(len(example) for pack in packs for example in pack)
        return microbatches, tokens

    def _collate(self, packs: Sequence[Any]) -> Batch:
        length = self.recipe.data.sequence_length
        pad_to = None
        if not pads_microbatches(self.grid):
            # Alone, a rank need not agree with neighbours on a length: no padding at the end.
            pad_to = max(1, filled_tokens(packs))
        return collate(packs, sequence_length=length, pad_id=self.dataset.tokenizer.eod, document_multiple=self.multiple, pad_to=pad_to)

    def one_pass(self) -> Iterator[list[Batch]]:
        """Every row once, in order (for evaluation)."""
        self.sampler.restart()
        for _ in range(self.sampler.steps_per_epoch):
            yield self.next_step()[0]


def fit(
    engine: Engine,
    train: Dataset,
    validation: Dataset,
    loss: LossFunction,
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
) -> Progress:
    """Train to the end of the recipe, or until a stopping rule holds; return where the run stands.

    generate: called with the step at each evaluation, on every rank; its metrics are logged with the loss.

    Raises TrainingStopped (a guard) and CheckpointError (a full disk); the last complete checkpoint stays. Raises
    Preempted on every rank, with the step saved, once one of them has received a stop signal.
    """
    recipe, grid = engine.recipe, engine.grid
    config = recipe.train
    batches = Batches(train, recipe, grid)
    held_out = Batches(validation, recipe, grid, evaluation=True, rows=config.eval_rows) if len(validation) else None
    steps = total_steps(recipe, len(train)) or 1
    progress = Progress()
    clip_alarm = ClipAlarm(recipe.optimizer.clip_grad)
    spike = SpikeGuard(config.spike_factor) if config.spike_factor else None
    peak_lr = scaled_lr(recipe, grid.data.size)
    started = time.monotonic()

    if resume_from is not None:
        saved = engine.load(resume_from, same_generators=_same_layout(resume_from, grid))["training"]
        progress = Progress(**{**saved["progress"], "evaluations": [tuple(pair) for pair in saved["progress"]["evaluations"]]})
        batches.sampler.load_state_dict(saved["sampler"])
        clip_alarm.load_state_dict(saved["clip_alarm"])
        if spike and saved["spike"]:
            spike.load_state_dict(saved["spike"])
        log.event(progress.step, "resume", f"continues from {resume_from.name}")

    def save() -> None:
        training = {
            "progress": vars(progress),
            "sampler": batches.sampler.state_dict(),
            "clip_alarm": clip_alarm.state_dict(),
            "spike": spike.state_dict() if spike else None,
        }
        meta = {"identity": identity, "recipe": recipe.model_dump(), "layout": grid.layout(), "training": training}
        checkpoints.save(progress.step, meta, progress.evaluations)

    def evaluate() -> None:
        assert held_out is not None
        result = engine.evaluate(list(held_out.one_pass()), loss)
        if not math.isfinite(result.loss):
            raise TrainingStopped(f"eval_loss is {result.loss}", progress.step, fix="the last checkpoint is intact; lower optimizer.lr")
        best = progress.best is None or result.loss < progress.best[1]
        progress.evaluations.append((progress.step, result.loss))
        more = {f"eval_{name}": value for name, value in {**result.metrics, **(generate(progress.step) if generate else {})}.items()}
        perplexity = math.exp(min(result.loss, 80.0))
        log.eval(progress.step, eval_loss=result.loss, eval_tokens=result.tokens, eval_perplexity=perplexity, best=best, **more)

    end = min(steps, config.stop_at_step or steps)
    if held_out is not None and _evaluation_owed(progress, end, config):
        evaluate()
    saved_at = progress.step if resume_from is not None else None
    engine.phases.watched = True
    while progress.step < end and not _no_improvement(progress, config):
        began = time.monotonic()
        engine.phases.step = progress.step + 1
        instruments.before_step(progress.step + 1)
        with engine.phases("data"):
            microbatches, tokens = batches.next_step()
        lr = learning_rate(
            progress.step,
            peak=peak_lr,
            minimum=recipe.optimizer.min_lr,
            warmup=recipe.optimizer.lr_warmup_steps,
            total=steps,
            style=recipe.optimizer.lr_decay_style,
            cycles=recipe.optimizer.lr_num_cycles,
            wsd_decay_steps=recipe.optimizer.lr_wsd_decay_steps or 0,
            wsd_decay_style=recipe.optimizer.lr_wsd_decay_style,
        )
        look = progress.step % EXPERT_LOAD_INTERVAL == 0 or progress.step + 1 == end
        if look:
            engine.experts.start()
        result = engine.train_step(microbatches, loss, lr, progress.step + 1)
        routing = engine.experts.collect() if look else {}
        routing |= engine.experts.auxiliary_losses(len(microbatches))
        progress.step += 1
        tokens = _over_data_ranks(tokens, grid)
        progress.tokens += tokens
        seconds = time.monotonic() - began
        achieved = tokens / seconds * flops_per_token
        if 0 < peak_flops < achieved:
            log.event(progress.step, "warning", f"the device's peak was measured while it was busy ({peak_flops / 1e9:,.0f} GFLOP/s); this step reached {achieved / 1e9:,.0f}, MFU now refers to that")
            peak_flops = achieved
        log.train(
            progress.step,
            loss=result.loss,
            learning_rate=lr,
            grad_norm=result.grad_norm,
            num_tokens=progress.tokens,
            tokens_per_second=tokens / seconds,
            mfu=achieved / peak_flops if peak_flops else None,
            step_time=seconds,
            epoch=round(batches.sampler.progress, 4),
            **result.metrics,
            **routing,
        )
        instruments.after_step(progress.step, seconds)
        checkpoints.poll()
        _watch(progress, result, routing, clip_alarm, spike, log)
        out_of_time = config.max_minutes is not None and any_rank(time.monotonic() - started > config.max_minutes * 60, grid)
        preempted = any_rank(stop.received is not None, grid)
        last = progress.step == end or out_of_time
        # A scheduler that will kill us soon is not kept waiting by an evaluation: it is made up for on resumption.
        evaluated = held_out is not None and not preempted and (last or (config.eval_interval and progress.step % config.eval_interval == 0))
        if evaluated:
            evaluate()
        is_best = evaluated and progress.best is not None and progress.best[0] == progress.step
        due = progress.step % config.save_interval == 0 if config.save_interval else evaluated
        if last or due or preempted or (is_best and config.keep_best > 0) or _no_improvement(progress, config):
            save()
            saved_at = progress.step
        if preempted:
            checkpoints.wait()
            any_rank(False, grid)  # nobody leaves before the logging rank is done with the files
            raise Preempted(progress.step, stop.received or "a stop signal on another rank")
        if out_of_time:
            log.event(progress.step, "stop", f"train.max_minutes = {config.max_minutes:g} is over")
            break
    if saved_at != progress.step and progress.step > 0:
        save()
    checkpoints.wait()
    instruments.close(progress.step)
    engine.phases.watched = False
    if isinstance(batches.sampler, MixtureSampler):
        log.event(progress.step, "mixture", batches.sampler.describe())
    if _no_improvement(progress, config):
        log.event(progress.step, "stop", f"eval_loss has not improved by more than {config.early_stop_min_delta:g} in {config.early_stop_patience} evaluations")
    elif progress.step == end < steps:
        log.event(progress.step, "stop", f"train.stop_at_step = {end}; the schedule has {steps} steps")
    return progress


def _watch(progress: Progress, result: StepResult, routing: dict[str, Any], clip: ClipAlarm, spike: SpikeGuard | None, log: NullLogger) -> None:
    warning = clip.observe(result.grad_norm)
    if warning:
        log.event(progress.step, "warning", warning)
    if routing.get("expert_load"):
        warning = expert_collapse(routing["expert_load"], assignments=float(result.tokens))
        if warning:
            log.event(progress.step, "warning", warning)
    if spike:
        message = spike.observe(result.loss)
        if message:
            raise TrainingStopped(message, progress.step, fix="the last checkpoint is from before; lower optimizer.lr, or raise train.spike_factor")


def _evaluation_owed(progress: Progress, end: int, config: TrainConfig) -> bool:
    """Before the first step, and where a stop signal left no time for the evaluation of the step that was saved."""
    if progress.step == 0:
        return config.eval_interval is not None
    done = bool(progress.evaluations) and progress.evaluations[-1][0] == progress.step
    return not done and (progress.step == end or (config.eval_interval is not None and progress.step % config.eval_interval == 0))


def _no_improvement(progress: Progress, config: TrainConfig) -> bool:
    return config.early_stop_patience is not None and progress.without_improvement(config.early_stop_min_delta) >= config.early_stop_patience


def _same_layout(checkpoint: Path, grid: Grid) -> bool:
    from megalign.parallel.checkpoint import read_meta

    return read_meta(checkpoint)["layout"] == grid.layout()


def _over_data_ranks(tokens: int, grid: Grid) -> int:
    if grid.data.size == 1:
        return tokens
    from megalign.parallel.init import device
    from megalign.parallel.schedule import sum_over

    return int(sum_over(torch.tensor(float(tokens), dtype=torch.float64, device=device()), grid.data.group).item())

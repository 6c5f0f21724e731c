"""A run in progress: where it stands, and what one step, one evaluation, one save and one resumption are.

The order in which they happen is the loop's (`trainer/loop.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from megalign.config.layout import scaled_lr, total_steps
from megalign.data.dataset import Dataset
from megalign.losses import cross_entropy_loss
from megalign.parallel.checkpoint import read_meta
from megalign.parallel.grid import Grid
from megalign.parallel.init import device
from megalign.parallel.schedule import sum_over
from megalign.trainer.batches import Batches
from megalign.trainer.checkpoints import Checkpoints
from megalign.trainer.engine import Engine, StepResult
from megalign.trainer.guard import ClipAlarm, SpikeGuard, TrainingStopped, expert_collapse
from megalign.trainer.metrics import NullLogger
from megalign.trainer.objective import Objective, scored_tokens
from megalign.trainer.schedule import learning_rate

CROSS_ENTROPY = Objective(lambda output, batch: cross_entropy_loss(*output), predict_ahead=False)  # on earlier data, whatever is trained
EXPERT_LOAD_INTERVAL = 10  # steps between looks at the routers


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0
    tokens: int = 0  # non-padding tokens seen
    evaluations: list[tuple[int, float]] = field(default_factory=list)  # (step, eval_loss)
    old: list[tuple[int, float]] = field(default_factory=list)  # (step, eval_old_loss), of train.forgetting_data

    @property
    def best(self) -> tuple[int, float] | None:
        """(step, eval_loss) of the best evaluation so far."""
        return min(self.evaluations, key=lambda pair: pair[1]) if self.evaluations else None

    @property
    def forgotten(self) -> float:
        """Nats by which the loss on earlier data has risen since it was first measured."""
        return self.old[-1][1] - self.old[0][1] if self.old else 0.0

    def without_improvement(self, min_delta: float) -> int:
        """Evaluations since eval_loss last fell by more than `min_delta` nats below its mark (Keras' EarlyStopping)."""
        mark, count = math.inf, 0
        for _, loss in self.evaluations:
            mark, count = (loss, 0) if loss < mark - min_delta else (mark, count + 1)
        return count


@dataclass(frozen=True)
class Step:
    """What one optimizer step did, equal on every rank."""

    result: StepResult
    learning_rate: float
    tokens: int  # non-padding, of the whole global batch
    routing: dict[str, Any]
    metrics: dict[str, float]  # those to log, of the loss and of the monitors
    warnings: list[str]  # of the monitors


class Monitor(Protocol):
    """Watches the steps of an algorithm. May raise TrainingStopped; its state is saved, so that a resumed run fires alike."""

    def observe(self, step: int, result: StepResult) -> tuple[dict[str, float], list[str]]:
        """Metrics of its own, and warnings."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def logged(metrics: dict[str, float]) -> dict[str, float]:
    """Without those that monitors alone read."""
    return {name: value for name, value in metrics.items() if not name.startswith("_")}


class Training:
    """Engine, data, objective and guards of one run.

    generate: called with the step at each evaluation, on every rank; its metrics are logged with the loss.
    monitors: of the algorithm; each sees every step.
    """

    def __init__(
        self,
        engine: Engine,
        train: Dataset,
        validation: Dataset,
        objective: Objective,
        *,
        log: NullLogger,
        checkpoints: Checkpoints,
        identity: dict[str, Any],
        generate: Callable[[int], dict[str, float]] | None = None,
        monitors: Mapping[str, Monitor] | None = None,
        old: Dataset | None = None,
    ):
        self.monitors = dict(monitors or {})
        self.engine, self.objective, self.log, self.checkpoints, self.identity, self.generate = engine, objective, log, checkpoints, identity, generate
        self.recipe, self.grid = engine.recipe, engine.grid
        self.config = config = self.recipe.train
        self.batches = Batches(train, self.recipe, self.grid)
        self.held_out = Batches(validation, self.recipe, self.grid, evaluation=True, rows=config.eval_rows) if len(validation) else None
        self.old = Batches(old, self.recipe, self.grid, evaluation=True) if old is not None else None
        self.steps = total_steps(self.recipe, len(train)) or 1  # of the schedule
        self.end = min(self.steps, config.stop_at_step or self.steps)
        self.peak_lr = scaled_lr(self.recipe, self.grid.data.size)
        self.progress = Progress()
        self.saved_at: int | None = None
        self.clip_alarm = ClipAlarm(self.recipe.optimizer.clip_grad)
        self.spike = SpikeGuard(config.spike_factor) if config.spike_factor else None

    def step(self) -> Step:
        """Take the next step and count it (collective)."""
        engine, progress = self.engine, self.progress
        engine.phases.step = progress.step + 1
        with engine.phases("data"):
            microbatches, tokens = self.batches.next_step()
        lr = self.learning_rate()
        look = progress.step % EXPERT_LOAD_INTERVAL == 0 or progress.step + 1 == self.end
        if look:
            engine.experts.start()
        result = engine.train_step(microbatches, self.objective, lr, progress.step + 1)
        routing = engine.experts.collect() if look else {}
        routing |= engine.experts.auxiliary_losses(len(microbatches))
        tokens = _over_data_ranks(tokens, self.grid)
        progress.step += 1
        progress.tokens += tokens
        metrics, warnings = logged(result.metrics), []
        for monitor in self.monitors.values():
            found, said = monitor.observe(progress.step, result)
            metrics, warnings = {**metrics, **found}, [*warnings, *said]
        return Step(result, lr, tokens, routing, metrics, warnings)

    def learning_rate(self) -> float:
        """Of the next step."""
        o = self.recipe.optimizer
        return learning_rate(
            self.progress.step,
            peak=self.peak_lr,
            minimum=o.min_lr,
            warmup=o.lr_warmup_steps,
            total=self.steps,
            style=o.lr_decay_style,
            cycles=o.lr_num_cycles,
            wsd_decay_steps=o.lr_wsd_decay_steps or 0,
            wsd_decay_style=o.lr_wsd_decay_style,
        )

    def look_for_trouble(self, step: Step) -> None:
        """Log what a guard warns of. Raises TrainingStopped on a spike of the loss."""
        at = self.progress.step
        warnings = [self.clip_alarm.observe(step.result.grad_norm), *step.warnings]
        if step.routing.get("expert_load"):
            warnings.append(expert_collapse(step.routing["expert_load"], assignments=float(step.result.tokens), layers=step.routing["expert_layers"]))
        for warning in filter(None, warnings):
            self.log.event(at, "warning", warning)
        spike = self.spike.observe(step.result.loss) if self.spike else None
        if spike:
            raise TrainingStopped(spike, at, fix="the last checkpoint is from before; lower optimizer.lr, or raise train.spike_factor")

    def evaluate(self) -> None:
        """Loss over the held-out rows, and what `generate` measures (collective). Raises TrainingStopped if it is not finite."""
        assert self.held_out is not None
        progress = self.progress
        with self.engine.averaged():
            result = self.engine.evaluate(list(self.held_out.one_pass()), self.objective)
            if self.old is not None:
                progress.old.append((progress.step, self.engine.evaluate(list(self.old.one_pass()), CROSS_ENTROPY).loss))
            generated = self.generate(progress.step) if self.generate and math.isfinite(result.loss) else {}
        if not math.isfinite(result.loss):
            raise TrainingStopped(f"eval_loss is {result.loss}", progress.step, fix="the last checkpoint is intact; lower optimizer.lr")
        best = progress.best is None or result.loss < progress.best[1]
        progress.evaluations.append((progress.step, result.loss))
        more = {f"eval_{name}": value for name, value in {**logged(result.metrics), **generated}.items()}
        if self.old is not None:
            more["eval_old_loss"] = progress.old[-1][1]
        if self.objective.count is scored_tokens:
            more["eval_perplexity"] = math.exp(min(result.loss, 80.0))
        self.log.eval(progress.step, eval_loss=result.loss, eval_tokens=result.tokens, best=best, **more)

    def evaluation_is_owed(self) -> bool:
        """Before the first step, and where a stop signal left no time for the evaluation of the step that was saved."""
        if self.held_out is None:
            return False
        progress, interval = self.progress, self.config.eval_interval
        if progress.step == 0:
            return interval is not None
        done = bool(progress.evaluations) and progress.evaluations[-1][0] == progress.step
        return not done and (progress.step == self.end or (interval is not None and progress.step % interval == 0))

    def evaluation_is_due(self, last: bool) -> bool:
        """After the step that was taken; always after the last one."""
        interval = self.config.eval_interval
        return self.held_out is not None and (last or (interval is not None and self.progress.step % interval == 0))

    def save_is_due(self, evaluated: bool) -> bool:
        """Every save_interval steps (without one: with every evaluation), at a new best, and before an early stop."""
        progress, config = self.progress, self.config
        due = progress.step % config.save_interval == 0 if config.save_interval else evaluated
        is_best = evaluated and progress.best is not None and progress.best[0] == progress.step
        return due or (is_best and config.keep_best > 0) or self.stopped_improving() or self.forgets()

    def stopped_improving(self) -> bool:
        """Whether `early_stop_patience` is over."""
        patience = self.config.early_stop_patience
        return patience is not None and self.progress.without_improvement(self.config.early_stop_min_delta) >= patience

    def forgets(self) -> bool:
        """Whether the loss on earlier data has risen by more than `forgetting_limit`."""
        return self.progress.forgotten > self.config.forgetting_limit

    def save(self) -> None:
        """Model, optimizer, and everything that the next step depends on (collective)."""
        training = {
            "progress": vars(self.progress),
            "sampler": self.batches.sampler.state_dict(),
            "clip_alarm": self.clip_alarm.state_dict(),
            "spike": self.spike.state_dict() if self.spike else None,
            "monitors": {name: monitor.state_dict() for name, monitor in self.monitors.items()},
        }
        meta = {"identity": self.identity, "recipe": self.recipe.model_dump(), "layout": self.grid.layout(), "training": training}
        self.checkpoints.save(self.progress.step, meta, self.progress.evaluations)
        self.saved_at = self.progress.step

    def resume(self, checkpoint: Path) -> None:
        """Stand where `checkpoint` stood (collective); in its own layout the next step is bitwise the one it would have taken."""
        same_layout = read_meta(checkpoint)["layout"] == self.grid.layout()
        saved = self.engine.load(checkpoint, same_generators=same_layout)["training"]
        pairs = {name: [tuple(pair) for pair in saved["progress"].get(name, [])] for name in ("evaluations", "old")}
        self.progress = Progress(**{**saved["progress"], **pairs})
        self.batches.sampler.load_state_dict(saved["sampler"])
        self.clip_alarm.load_state_dict(saved["clip_alarm"])
        if self.spike and saved["spike"]:
            self.spike.load_state_dict(saved["spike"])
        for name, state in saved.get("monitors", {}).items():
            if name in self.monitors:
                self.monitors[name].load_state_dict(state)
        self.saved_at = self.progress.step
        self.log.event(self.progress.step, "resume", f"continues from {checkpoint.name}")


def _over_data_ranks(tokens: int, grid: Grid) -> int:
    if grid.data.size == 1:
        return tokens
    return int(sum_over(torch.tensor(float(tokens), dtype=torch.float64, device=device()), grid.data.group).item())

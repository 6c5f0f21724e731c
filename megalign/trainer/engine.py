"""Model, optimizer and grid of a run: one training step, one evaluation, save and load."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalign.batch import Batch
from megalign.config.schema import Recipe
from megalign.models.adapters import add_adapters
from megalign.models.build import build_chunks, run_options
from megalign.models.forward import head_values, logprobs_ahead, read_by
from megalign.models.freeze import freeze
from megalign.models.heads import HeadShape
from megalign.models.pretrained import load_pretrained
from megalign.models.weights import initialise, named_parameters
from megalign.parallel import checkpoint
from megalign.parallel.grid import Grid
from megalign.parallel.init import device
from megalign.parallel.optimizer import (
    create_optimizer,
    gradients_are_finite,
    main_gradients,
    set_learning_rate,
    wrap_data_parallel,
    zero_gradients,
)
from megalign.parallel.placement import place
from megalign.parallel.reduction import Reduction, attach
from megalign.parallel.saving import Save
from megalign.parallel.schedule import forward_backward, from_last_stage, sum_over
from megalign.parallel.shadow import Shadow
from megalign.parallel.unsynchronised import leave_out, unreduced
from megalign.trainer.audit import RunAudit
from megalign.trainer.experts import ExpertWatch
from megalign.trainer.guard import TrainingStopped, describe_non_finite
from megalign.trainer.objective import Head, Objective, denominators, scalar_and_sums
from megalign.trainer.phases import MegatronTimers, Phases

ADAM = {"lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad"}  # keys that megatron's optimizer has too


@dataclass(frozen=True)
class StepResult:
    """Means over what the objective counts in the whole global batch, equal on every rank."""

    loss: float
    tokens: int  # scored
    metrics: dict[str, float]
    grad_norm: float = 0.0


@dataclass(frozen=True)
class _Sums:
    """What a step adds up to: `values` over `count`; a name with # is the count of the metric before it."""

    values: dict[str, float]
    count: float
    tokens: float

    def __add__(self, other: _Sums) -> _Sums:
        values = {name: self.values.get(name, 0.0) + value for name, value in other.values.items()}
        return _Sums(values, self.count + other.count, self.tokens + other.tokens)

    def means(self, grad_norm: float = 0.0) -> StepResult:
        named = {name: value for name, value in self.values.items() if not name.endswith("#") and self.values.get(f"{name}#") != 0}  # a mean of nothing is left out
        means = {name: value / (self.values.get(f"{name}#", self.count) or 1.0) for name, value in named.items()}
        return StepResult(means.pop("loss"), int(self.tokens), means, grad_norm)


class Engine:
    """The sharded model of a recipe with its optimizer."""

    def __init__(self, recipe: Recipe, grid: Grid, vocab_size: int, *, train: bool = True, heads: Mapping[str, HeadShape] | None = None):
        """Build and initialise (from `model.init_from`, else at random). train=False: no optimizer, no DDP.

        heads: of a reward model, which gives numbers in the place of log-probabilities.
        """
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
        from megatron.core.transformer.module import Float16Module

        self.grid, self.recipe, self.heads = grid, recipe, heads
        self._names: dict[tuple[Any, int], list[str]] = {}
        seed = recipe.train.seed
        torch.manual_seed(seed + grid.data.rank + 100 * grid.pipeline.rank)
        model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
        bf16 = recipe.train.precision == "bf16"
        parallel = recipe.parallel
        models = build_chunks(
            recipe.model, grid, vocab_size, sequence_parallel=parallel.sequence_parallel, bf16=bf16, options=run_options(recipe), heads=heads
        )
        if recipe.model.init_from:
            load_pretrained(models, recipe.model, grid, vocab_size, seed)
        else:
            initialise(models, recipe.model, grid, seed)
        add_adapters(models, recipe.model, recipe.lora, grid, seed)
        if train:
            freeze(models, grid, recipe.train.freeze)
            named: Any = [(name, parameter) for name, parameter, _ in named_parameters(models, grid)]
            self.placements = place(models, named, grid, hooks=parallel.reduce_in_backward)
        self.config: Any = models[0].config
        self.phases = Phases(synchronize=recipe.logging.timers, nvtx=recipe.logging.nvtx and torch.cuda.is_available())
        self.config.timers = MegatronTimers(self.phases)
        self.experts = ExpertWatch(models, grid)
        self.models = models
        self.chunks: list[Any] = [Float16Module(self.config, model) for model in models] if bf16 else list(models)
        self.optimizer: Any = None
        self.shadow: Shadow | None = None
        if train:
            self.chunks = wrap_data_parallel(
                self.chunks,
                self.config,
                use_distributed_optimizer=parallel.use_distributed_optimizer,
                overlap_grad_reduce=parallel.overlap_grad_reduce,
                overlap_param_gather=parallel.overlap_param_gather,
            )
            self.placements, left_out = unreduced(self.placements, grid, parallel.unsynchronised)
            if parallel.unsynchronised:
                leave_out(self.chunks, left_out, grid)
            self.reduction: Reduction = attach(self.chunks, self.placements, grid)
            self.optimizer = create_optimizer(
                self.chunks,
                bf16=bf16,
                use_distributed_optimizer=parallel.use_distributed_optimizer,
                overlap_param_gather=parallel.overlap_param_gather,
                cpu_offload=recipe.optimizer.optimizer_cpu_offload,
                **recipe.optimizer.model_dump(include=ADAM),
            )
            if recipe.train.ema_decay is not None:
                self.shadow = Shadow(self.optimizer, [p for model in models for p in model.parameters()], recipe.train.ema_decay)
            self.audit = RunAudit(self)

    def train_step(self, microbatches: Sequence[Batch], objective: Objective, lr: float, step: int) -> StepResult:
        """Forward, backward, clip, update. Raises TrainingStopped, before the update, on anything not finite."""
        for chunk in self.chunks:
            chunk.train()
        zero_gradients(self.chunks, self.optimizer)
        sums, losses = self._run(microbatches, objective, forward_only=False)
        if self.recipe.train.nan_guard:
            self._stop_if_not_finite(losses, step)
        self.audit.before_update(step)
        with self.phases("optimizer"):
            set_learning_rate(self.optimizer, lr)
            _, grad_norm, _ = self.optimizer.step()
            if self.shadow is not None:
                self.shadow.update()
        return sums.means(float(grad_norm or 0.0))

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the weights are the moving average, where `train.eval_ema` asks for it (collective)."""
        return self.shadow.in_place() if self.shadow is not None and self.recipe.train.eval_ema else contextlib.nullcontext()

    @torch.no_grad()
    def evaluate(self, steps: Sequence[Sequence[Batch]], objective: Objective) -> StepResult:
        """Mean loss over all batches, each a list of microbatches; the model is left as it was."""
        for chunk in self.chunks:
            chunk.eval()
        total = _Sums({"loss": 0.0}, 0.0, 0.0)
        with self.phases("eval"), self._deterministic_routing():
            for microbatches in steps:
                total += self._run(microbatches, objective, forward_only=True)[0]
        for chunk in self.chunks:
            chunk.train()
        return total.means()

    @torch.no_grad()
    def score(self, microbatches: Sequence[Batch], read: Callable[[Tensor, Batch], Tensor], head: Head | None = None) -> list[Tensor]:
        """`read` of what the last stage returns (with `head`, see `Objective`) for each microbatch (last stage; none on the others).

        The model is left as it was.
        """
        modes = [chunk.training for chunk in self.chunks]
        counting, self.experts.counting = self.experts.counting, False  # of routers: the step's own tokens alone
        for chunk in self.chunks:
            chunk.eval()

        def forward_step(chunk: Any, batch: Batch) -> Any:
            def to_megatron(output: Tensor) -> Any:
                return output.sum(), {"found": read(output, batch)}

            return self._outputs(chunk, batch, 0, head), to_megatron

        with self._deterministic_routing():
            outputs = forward_backward(
                self.chunks, microbatches, forward_step, grid=self.grid, tokens_per_microbatch=len(microbatches[0].tokens), forward_only=True
            )
        self.experts.counting = counting
        for chunk, mode in zip(self.chunks, modes):
            chunk.train(mode)
        return [part["found"] for part in outputs]

    def _outputs(self, chunk: Any, batch: Batch, depths: int, head: Head | None) -> Any:
        if head is not None:
            return read_by(chunk, batch, self.grid, head)
        return head_values(chunk, batch, self.grid) if self.heads else logprobs_ahead(chunk, batch, self.grid, depths)

    @contextlib.contextmanager
    def _deterministic_routing(self) -> Iterator[None]:
        """Without what megatron-core does in eval mode too: noise on the router's input (router.py:520), tokens dropped by capacity."""
        names = ("moe_input_jitter_eps", "moe_expert_capacity_factor")
        kept = {name: getattr(self.config, name) for name in names}
        for name in names:
            setattr(self.config, name, None)
        try:
            yield
        finally:
            for name, value in kept.items():
                setattr(self.config, name, value)

    def _run(self, microbatches: Sequence[Batch], objective: Objective, *, forward_only: bool) -> tuple[_Sums, list[float]]:
        grid = self.grid
        model = self.recipe.model
        wanted = objective.predict_ahead and model.mtp_loss_scaling_factor and not forward_only
        depths = (model.mtp_num_layers or 0) if wanted else 0
        if objective.prepare is not None:
            objective.prepare(microbatches)
        counts = denominators(microbatches, objective.count, depths, grid)  # known, and the same everywhere, before the first forward

        def forward_step(chunk: Any, batch: Batch) -> Any:
            def to_megatron(output: Any) -> Any:
                main, ahead = (output[0], output[1:]) if depths else (output, [])
                return scalar_and_sums(objective.loss(main, batch), ahead, counts, model.mtp_loss_scaling_factor, len(microbatches), grid)

            return self._outputs(chunk, batch, depths, objective.head), to_megatron

        outputs = forward_backward(
            self.chunks,
            microbatches,
            forward_step,
            grid=grid,
            tokens_per_microbatch=len(microbatches[0].tokens),
            forward_only=forward_only,
        )
        names = self._metric_names(outputs, (objective.loss, depths))
        sums = torch.zeros(len(names), device=device())
        if outputs:
            sums = torch.stack([torch.stack([part[name].float() for part in outputs]).sum() for name in names])
        sums = from_last_stage(sum_over(sums, grid.data_context.group), grid)
        losses = [float(part["loss"]) for part in outputs]
        return _Sums(dict(zip(names, sums.tolist(), strict=True)), counts.count, counts.tokens), losses

    def _metric_names(self, outputs: list[dict[str, Any]], key: tuple[Any, int]) -> list[str]:
        """The last stage knows them; the others are told, once for each loss, with and without prediction modules."""
        if key not in self._names:
            names = [list(outputs[0]) if outputs else None]
            if self.grid.pipeline.size > 1:
                dist.broadcast_object_list(names, self.grid.last_stage_rank, group=self.grid.pipeline.group)
            self._names[key] = names[0] or []
        return self._names[key]

    def _stop_if_not_finite(self, losses: list[float], step: int) -> None:
        loss_ok = all(value - value == 0 for value in losses)
        flag = torch.tensor([float(not (loss_ok and gradients_are_finite(self.chunks)))], device=device())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if flag.item() == 0:
            return
        bad_losses = [i for i, value in enumerate(losses) if value - value != 0]
        report = (bad_losses, describe_non_finite(main_gradients(self.chunks)))
        reports: list[Any] = [None] * self.grid.world
        dist.all_gather_object(reports, report)
        microbatch = next((bad[0] for bad, _ in reports if bad), None)
        named = [(rank, lines[0]) for rank, (_, lines) in enumerate(reports) if lines]
        cause = "the loss is not finite" if microbatch is not None else "a gradient is not finite although every loss is"
        parameter = None
        if named:
            rank, line = named[0]
            parameter = line.split(":")[0]
            cause += f" (rank {rank}: {line}; {sum(len(lines) for _, lines in reports)} gradients in all)"
        fix = "no update was made; the last checkpoint is intact. Lower optimizer.lr, or look at that microbatch's rows"
        raise TrainingStopped(cause, step, microbatch=microbatch, parameter=parameter, fix=fix)

    def save(self, folder: Path, step: int, meta: dict[str, Any], extra: Callable[[Path], None] | None = None, *, background: bool = False) -> Save:
        """Begin a checkpoint of model and optimizer (collective); it appears when the caller finishes it."""
        return Save(folder, step, self.chunks, self.optimizer, meta, self.grid, extra, background=background, shadow=self.shadow)

    def load(self, path: Path, *, same_generators: bool = False, weights_only: bool = False) -> dict[str, Any]:
        """Load a checkpoint of any layout (collective); return what was remembered with it.

        weights_only: to be used as they are; the averaged ones with `train.eval_ema`.
        """
        optimizer, shadow = (None, None) if weights_only else (self.optimizer, self.shadow)
        average = weights_only and self.recipe.train.eval_ema
        meta = checkpoint.load(path, self.chunks, optimizer, self.grid, same_generators=same_generators, shadow=shadow, average=average)
        if weights_only and self.optimizer is not None:
            self.optimizer.reload_model_params()
        return meta

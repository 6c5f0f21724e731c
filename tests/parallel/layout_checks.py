"""One training step on any layout: loss and every full gradient, for comparison with one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from megalign.batch import Batch, collate
from megalign.config.schema import ModelConfig
from megalign.data.rows import Example

VOCAB = 120  # padded to 128
SEQUENCE = 32


def microbatches(count: int, document_multiple: int = 1) -> list[Batch]:
    """Packed rows of random documents of different lengths; about half of the tokens are scored."""
    numbers = np.random.default_rng(7)
    rows = []
    for _ in range(count):
        documents = []
        for length in (12, 8, 9):
            mask = numbers.random(length) < 0.5
            mask[0], mask[-1] = False, True
            documents.append(Example(numbers.integers(0, VOCAB, length).astype(np.int32), mask))
        rows.append(collate([documents], sequence_length=SEQUENCE + 8 * (document_multiple > 1), pad_id=0, document_multiple=document_multiple))
    return rows


def step_save_load_step(model: dict[str, Any], layout: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A step, a checkpoint saved and loaded, another step; then Adam's step counts and what was started on the way."""
    import multiprocessing

    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
    from torch._dynamo.utils import counters

    from megalign.parallel import checkpoint, saving

    run = Run(model, layout, distributed=True)
    run.step()
    saved = saving.Save(folder, 1, run.chunks, run.optimizer, {"step": 1}, run.grid).finish()
    checkpoint.load(saved, run.chunks, run.optimizer, run.grid, same_generators=True)
    run.step()
    inner = [part.optimizer for part in getattr(run.optimizer, "chained_optimizers", [run.optimizer])]
    steps = sorted({float(state["step"]) for optimizer in inner for state in optimizer.state.values()})
    before = torch.get_rng_state()
    tracker: Any = get_cuda_rng_tracker()
    with tracker.fork():
        torch.rand(3)
    isolated = torch.equal(before, torch.get_rng_state())  # what is drawn in a fork must not move the default generator
    return {"isolated": isolated, "compiled": bool(counters["frames"]), "helpers": len(multiprocessing.active_children()), "adam_steps": steps}


def gradients(model: dict[str, Any], layout: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Losses, the last gradient norm, full gradients and weights after steps over 4 microbatches on this layout."""
    from megalign.models.weights import stream_full
    from megalign.parallel.grid import destroy_grid

    distributed = options.get("use_distributed_optimizer", False)
    run = Run(
        model,
        layout,
        distributed=distributed,
        document_multiple=options.get("document_multiple", 1),
        options=options.get("megatron"),
        hooks=options.get("hooks", True),
        **options.get("run", {}),
    )
    if "frozen" in options:
        for name, parameter in run.chunks[0].named_parameters():
            parameter.requires_grad_(options["frozen"] not in name)
    torch.manual_seed(options.get("seed", 0))  # what dropout draws
    losses, grads, norm = [], {}, 0.0
    for _ in range(options.get("steps", 1)):
        losses.append(run.backward())
        if not (distributed and run.grid.data_context.size > 1):  # there each rank has its part of the buffer only
            grads = {name: full.clone() for name, full in stream_full(run.chunks, run.grid, value=_main_grad)}
        _, norm, _ = run.optimizer.step()
    weights = {name: full.clone() for name, full in stream_full(run.chunks, run.grid)} if options.get("weights") else {}
    destroy_grid()
    return {"losses": losses, "norm": float(norm), "grads": grads, "weights": weights}


def _main_grad(parameter: Any) -> torch.Tensor:
    return parameter.main_grad


class Run:
    """A small model with its optimizer on a layout, and four microbatches shared out over its data ranks."""

    def __init__(
        self,
        model: dict[str, Any],
        layout: dict[str, Any],
        *,
        distributed: bool,
        document_multiple: int = 1,
        options: dict[str, Any] | None = None,
        hooks: bool | None = True,
        overlap: bool = False,
        overlap_param_gather: bool = False,
        bf16: bool = False,
        bucket_size: int | None = None,
        prepare: Any = None,
        tamper: Any = None,
        rows: int = 4,
        lr: float = 1e-3,
        adam_eps: float = 1e-8,
    ):
        """hooks: as `place` takes it; None: megatron alone. prepare(models, grid), tamper(run): before and after parameters are placed.
        overlap: of the gradients' reduction. rows: microbatches of the whole step."""
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
        from megatron.core.transformer.module import Float16Module

        from megalign.models.build import build_chunks
        from megalign.models.weights import initialise, named_parameters
        from megalign.parallel.grid import create_grid
        from megalign.parallel.optimizer import create_optimizer, wrap_data_parallel
        from megalign.parallel.placement import place
        from megalign.parallel.reduction import attach

        sizes = {key: value for key, value in layout.items() if key != "sequence_parallel"}
        self.grid = create_grid(**sizes)
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        self.model = config = ModelConfig(**model)
        sequence_parallel = layout.get("sequence_parallel", False)
        models = build_chunks(config, self.grid, VOCAB, sequence_parallel=sequence_parallel, bf16=bf16, options=options)
        initialise(models, config, self.grid, seed=3)
        if prepare is not None:
            prepare(models, self.grid)
        self.models, self.config = models, models[0].config
        if hooks is not None:
            named: Any = [(name, parameter) for name, parameter, _ in named_parameters(models, self.grid)]
            self.placements = place(models, named, self.grid, hooks=hooks)
        if tamper is not None:
            tamper(self)
        chunks: list[Any] = [Float16Module(self.config, chunk) for chunk in models] if bf16 else models
        self.chunks = wrap_data_parallel(
            chunks,
            self.config,
            use_distributed_optimizer=distributed,
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap_param_gather,
            bucket_size=bucket_size,
        )
        if hooks is not None:
            self.reduction = attach(self.chunks, self.placements, self.grid)
        self.optimizer = create_optimizer(
            self.chunks,
            lr=lr,
            weight_decay=0.01,
            adam_beta1=0.9,
            adam_beta2=0.95,
            adam_eps=adam_eps,
            clip_grad=1.0,
            bf16=bf16,
            use_distributed_optimizer=distributed,
            overlap_param_gather=overlap_param_gather,
        )
        everything = microbatches(rows, document_multiple)
        share = len(everything) // self.grid.data.size
        self.mine = everything[self.grid.data.rank * share : (self.grid.data.rank + 1) * share]
        self.total = sum(int(batch.loss_mask.sum()) for batch in everything)

    def backward(self) -> float:
        """Forward and backward; return the mean loss over all scored tokens."""
        from megalign.losses import cross_entropy_loss
        from megalign.models.forward import logprobs_ahead
        from megalign.parallel.optimizer import zero_gradients
        from megalign.parallel.schedule import (
            forward_backward,
            from_last_stage,
            sum_over,
        )
        from megalign.trainer.objective import denominators, scalar_and_sums, scored_tokens

        depths = self.model.mtp_num_layers or 0
        counts = denominators(self.mine, scored_tokens, depths, self.grid)

        def forward(chunk: Any, batch: Batch) -> Any:
            def loss(output: Any) -> Any:
                main, ahead = (output[0], output[1:]) if depths else (output, [])
                return scalar_and_sums(cross_entropy_loss(*main), ahead, counts, self.model.mtp_loss_scaling_factor, len(self.mine), self.grid)

            return logprobs_ahead(chunk, batch, self.grid, depths), loss

        zero_gradients(self.chunks, self.optimizer)
        tokens = len(self.mine[0].tokens)
        metrics = forward_backward(self.chunks, self.mine, forward, grid=self.grid, tokens_per_microbatch=tokens)
        local = torch.tensor(float(sum(part["loss"] for part in metrics)))
        total = from_last_stage(sum_over(local, self.grid.data_context.group), self.grid)
        return (total / self.total).item()

    def step(self) -> None:
        """One optimizer step."""
        self.backward()
        self.optimizer.step()


def gradients_without_norm_reduction(model: dict[str, Any], layout: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The same with a defect: no RMSNorm asks for its gradient to be summed."""
    from megalign.parallel import layers

    original = layers.RMSNorm.__init__

    def forgetful(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.weight.sequence_parallel = False

    layers.RMSNorm.__init__ = forgetful  # this process is a fork of its own
    return gradients(model, layout, {**options, "hooks": None})


def gradients_without_key_sum(model: dict[str, Any], layout: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The same with a defect: each tensor rank keeps its heads' part of the rotary key's gradient."""
    from megalign.models import build

    build.sum_rotary_key_gradients = lambda *_: None  # this process is a fork of its own
    return gradients(model, layout, options)


def gradients_with_cut_down_projections(model: dict[str, Any], layout: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The same with upstream's local spec of multi-latent attention: down projections cut by columns."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    from megalign.models.hf import shards
    from megalign.parallel import layers

    layers.Linear = ColumnParallelLinear  # this process is a fork of its own
    for name in ("q", "kv"):
        shards.CUTS[f"decoder.layers.{{layer}}.self_attention.linear_{name}_down_proj.weight"] = shards.Rows
    return gradients(model, layout, options)


def sweep(cases: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]) -> list[dict[str, Any]]:
    """`gradients` of several (model, layout, options), one after the other in one launch."""
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

    found = []
    for case in cases:
        get_moe_layer_wise_logging_tracker().clear()  # it is as long as the last model had layers
        found.append(gradients(*case))
    return found


def weights_of_checkpoint(
    model: dict[str, Any], layout: dict[str, Any], options: dict[str, Any], folder: Path, load: Path | None, how: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Step and save, or load what another layout saved: {"path": checkpoint, "weights": full weights}, and the next loss.

    how: other arguments of `Run`.
    """
    from megalign.models.weights import stream_full
    from megalign.parallel import checkpoint, saving

    run = Run(model, layout, distributed=True, options=options, **(how or {}))
    if load is None:
        run.step()
        load = saving.Save(folder, 1, run.chunks, run.optimizer, {"step": 1}, run.grid).finish()
    else:
        checkpoint.load(load, run.chunks, run.optimizer, run.grid)
    weights = {name: full.clone() for name, full in stream_full(run.chunks, run.grid)}
    run.step()
    return {"path": load, "weights": weights, "loss": run.backward()}

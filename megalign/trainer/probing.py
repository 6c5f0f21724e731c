"""The start-up probe of a run: its model in FP64, random tokens, the recipe's layout (`megalign.parallel.audit.probe`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megalign.batch import Batch, collate
from megalign.data.rows import Example
from megalign.losses import cross_entropy_loss
from megalign.models.forward import logprobs_ahead
from megalign.models.held import held_by
from megalign.models.weights import named_parameters
from megalign.parallel.audit.findings import Finding
from megalign.parallel.audit.probe import in_double, kept_in_double, probe
from megalign.parallel.grid import Grid
from megalign.parallel.init import device
from megalign.parallel.optimizer import wrap_data_parallel
from megalign.parallel.placement import place
from megalign.parallel.reduction import attach
from megalign.parallel.schedule import forward_backward, from_last_stage, sum_over
from megalign.trainer.objective import denominators, scalar_and_sums, scored_tokens

if TYPE_CHECKING:
    from megalign.trainer.engine import Engine

LENGTH = 48  # tokens of a row


def random_batches(grid: Grid, vocab_size: int, rows: int, *, length: int = LENGTH, seed: int = 0) -> list[Batch]:
    """`rows` packed rows of random documents for this data-parallel rank, about half of the tokens scored."""
    multiple = 2 * grid.context.size if grid.context.size > 1 else 1
    numbers = np.random.default_rng((seed, grid.data.rank))
    batches = []
    for _ in range(rows):
        documents = []
        for share in (0.5, 0.3, 0.2):
            size = max(2 * multiple, int(length * share) // multiple * multiple)
            mask = numbers.random(size) < 0.5
            mask[0], mask[-1] = False, True
            documents.append(Example(numbers.integers(0, vocab_size, size).astype(np.int32), mask))
        whole = -(-sum(len(d) for d in documents) // (multiple * grid.tensor.size)) * multiple * grid.tensor.size
        batches.append(collate([documents], sequence_length=whole, pad_id=0, document_multiple=multiple))
    return batches


def probe_engine(engine: Engine, vocab_size: int) -> list[Finding]:
    """Gradients of the engine's model against differences of its loss (collective)."""
    grid = engine.grid
    models = in_double(engine.models, grid)
    config: Any = models[0].config
    named: Any = [(name, parameter) for name, parameter, _ in named_parameters(models, grid)]
    placements = place(models, named, grid, hooks=engine.recipe.parallel.reduce_in_backward)
    chunks = wrap_data_parallel(models, config, use_distributed_optimizer=False, grad_reduce_in_fp32=False)
    attach(chunks, placements, grid)
    rows = max(2, grid.pipeline.size)
    batches = random_batches(grid, vocab_size, rows)
    model = engine.recipe.model
    scale = model.mtp_loss_scaling_factor
    depths = (model.mtp_num_layers or 0) if scale else 0
    counts = denominators(batches, scored_tokens, depths, grid)

    def loss(backward: bool) -> float:
        def step(chunk: Any, batch: Batch) -> Any:
            def to_megatron(output: Any) -> Any:
                main, ahead = (output[0], output[1:]) if depths else (output, [])
                return scalar_and_sums(cross_entropy_loss(*main), ahead, counts, scale, rows, grid)

            return logprobs_ahead(chunk, batch, grid, depths), to_megatron

        outputs = forward_backward(chunks, batches, step, grid=grid, tokens_per_microbatch=len(batches[0].tokens), forward_only=not backward)
        # From the sums that are logged, not from the scalar that was differentiated: its factors are under test.
        total = torch.zeros(1, dtype=torch.float64, device=device())
        for part in outputs:
            total += part["loss"] + sum(part[f"mtp_{k}_loss"] for k in range(1, depths + 1)) * (scale / max(1, depths))
        return (from_last_stage(sum_over(total, grid.data_context.group), grid) / counts.count).item()

    with kept_in_double():
        return probe(chunks, held_by(models, grid), placements, loss, grid)

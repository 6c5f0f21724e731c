"""A reward model's loss, metrics and gradients, three heads on pairs and labelled answers, on any layout."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import numpy as np
import torch
from lora_checks import fill_b

from megalign.batch import Batch, collate
from megalign.config.schema import Recipe
from megalign.data.rows import Example

VOCAB, ROW, MULTIPLE = 120, 64, 4
HEADS = {
    "quality": {"loss": "bradley_terry", "centering": 0.1, "margin": 0.5},
    "returns": {"loss": "binary", "weight": 0.5},
    "stars": {"loss": "ordinal", "classes": 4},
    "gap": {"loss": "weibull", "weight": 0.3},
}


def microbatches(count: int) -> list[Batch]:
    """Two rows each: a pair and a single answer, in the first two pairs; the last microbatch is all padding."""
    numbers = np.random.default_rng(11)
    batches = []
    for number in range(count):
        packs: list[list[Example]] = []
        for row in range(2):
            paired = row == 0 or number == 0
            facts = {"weight": 0.25 if number == 1 else 1.0, "row": float(2 * number + row), "margin": float(numbers.random())}
            documents = []
            for side in (1.0, -1.0) if paired else (0.0,):
                ids = numbers.integers(0, VOCAB, numbers.integers(7, 27)).astype(np.int32)
                labels = {
                    "quality": (-1.0 if number == 2 else 1.0) if paired else math.nan,
                    "returns": math.nan if paired else float(number % 3 == 1),
                    "stars": math.nan if paired else float(number % 4),
                    "gap": math.nan if paired else 1.5 + number,
                    "gap.observed": float(number != 1),
                }
                documents.append(Example(ids, np.arange(len(ids)) > 3, values={**facts, "side": side, **labels}))
            packs.append(documents if number + 1 < count or count == 1 else [])
        batches.append(collate(packs, sequence_length=ROW, pad_id=0, document_multiple=MULTIPLE))
    return batches


def steps(cases: list[dict[str, Any]], spoil: str | None = None) -> list[dict[str, Any]]:
    """`step` of several recipes, one after the other in one launch. spoil: declare heads so."""
    with mock.patch("megalign.models.heads.declare", _declared_as(spoil)) if spoil else mock.MagicMock():
        return [step(case) for case in cases]


def _declared_as(tensor: str) -> Any:
    from megalign.parallel.placement import declare

    return lambda parameter, **said: declare(parameter, tensor=tensor)  # type: ignore[arg-type]


def _main_grad(parameter: Any) -> torch.Tensor:
    return parameter.main_grad


def step(case: dict[str, Any]) -> dict[str, Any]:
    """Means, full gradients in FP32 and in FP64, and the values of every document."""
    import os

    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

    from megalign.models.sequences import document_values
    from megalign.models.weights import stream_full
    from megalign.parallel.grid import destroy_grid
    from megalign.parallel.init import read_world
    from megalign.parallel.optimizer import zero_gradients
    from megalign.rewards.heads import shapes_of
    from megalign.rm import reward_objective
    from megalign.trainer.engine import Engine
    from megalign.trainer.run import grid_of

    get_moe_layer_wise_logging_tracker().clear()
    recipe = Recipe.model_validate(case)
    grid = grid_of(recipe, read_world(os.environ))
    engine = Engine(recipe, grid, VOCAB, heads=shapes_of(recipe.rm.heads))
    everything = microbatches(4)
    share = len(everything) // grid.data.size
    mine = everything[grid.data.rank * share : (grid.data.rank + 1) * share]
    objective = reward_objective(recipe, grid)
    if recipe.lora.rank is not None:
        fill_b(engine)
    zero_gradients(engine.chunks, engine.optimizer)
    sums, _ = engine._run(mine, objective, forward_only=False)
    grads = {name: full.double().clone() for name, full in stream_full(engine.chunks, grid, value=_main_grad, only=trained_by(recipe))}
    scored = engine.score(mine, lambda output, batch: document_values(output, batch, grid))
    dtypes = {values.dtype for values in scored}
    double = in_float64(engine, mine, objective)
    destroy_grid()
    return {
        "means": sums.means(), "count": sums.count, "grads": grads, "double": double, "values": [values.tolist() for values in scored],
        "dtypes": [str(d) for d in dtypes],
    }  # fmt: skip


def in_float64(engine: Any, mine: list[Batch], objective: Any) -> dict[str, torch.Tensor]:
    """Full gradients of the same step on an FP64 copy of the model, hooked and reduced like the model itself."""
    from megalign.models.forward import head_values
    from megalign.models.weights import named_parameters, stream_full
    from megalign.parallel.audit.probe import in_double, kept_in_double
    from megalign.parallel.optimizer import wrap_data_parallel
    from megalign.parallel.placement import place
    from megalign.parallel.reduction import attach
    from megalign.parallel.schedule import forward_backward
    from megalign.trainer.objective import denominators, scalar_and_sums

    grid = engine.grid
    models = in_double(engine.models, grid)
    named: Any = [(name, parameter) for name, parameter, _ in named_parameters(models, grid)]
    placements = place(models, named, grid, hooks=engine.recipe.parallel.reduce_in_backward)
    chunks = wrap_data_parallel(models, models[0].config, use_distributed_optimizer=False, grad_reduce_in_fp32=False)
    attach(chunks, placements, grid)
    objective.prepare(mine)
    counts = denominators(mine, objective.count, 0, grid)

    def forward_step(chunk: Any, batch: Batch) -> Any:
        return head_values(chunk, batch, grid), lambda output: scalar_and_sums(objective.loss(output, batch), [], counts, 0.0, len(mine), grid)

    with kept_in_double():
        forward_backward(chunks, mine, forward_step, grid=grid, tokens_per_microbatch=len(mine[0].tokens))
    return {name: full.clone() for name, full in stream_full(chunks, grid, value=_main_grad, only=trained_by(engine.recipe))}


def trained_by(recipe: Recipe) -> Any:
    """Under LoRA the adapters and the heads; else everything."""
    from megalign.models.heads import is_head
    from megalign.parallel.lora import is_adapter

    return lambda name: recipe.lora.rank is None or is_adapter(name) or is_head(name)

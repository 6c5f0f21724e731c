"""A reward model's loss, metrics and gradients, three heads on pairs and labelled answers, on any layout."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import numpy as np
import torch

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


def steps(cases: list[dict[str, Any]], exact: bool = False, spoil: str | None = None) -> list[dict[str, Any]]:
    """`step` of several recipes, one after the other in one launch. exact: in float64. spoil: declare heads so."""
    with mock.patch("megalign.models.heads.declare", _declared_as(spoil)) if spoil else mock.MagicMock():
        return [step(case, exact) for case in cases]


def _declared_as(tensor: str) -> Any:
    from megalign.parallel.placement import declare

    return lambda parameter, **said: declare(parameter, tensor=tensor)  # type: ignore[arg-type]


def _main_grad(parameter: Any) -> torch.Tensor:
    return parameter.main_grad


def _grad(parameter: Any) -> torch.Tensor:
    return parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)


def step(case: dict[str, Any], exact: bool) -> dict[str, Any]:
    """Means, full gradients and the values of every document."""
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
    zero_gradients(engine.chunks, engine.optimizer)
    sums, _ = engine._run(mine, objective, forward_only=False)
    grads = {name: full.double().clone() for name, full in stream_full(engine.chunks, grid, value=_main_grad)}
    scored = engine.score(mine, lambda output, batch: document_values(output, batch, grid))
    dtypes = {values.dtype for values in scored}
    destroy_grid()
    return {"means": sums.means(), "count": sums.count, "grads": grads, "values": [values.tolist() for values in scored], "dtypes": [str(d) for d in dtypes]}

"""A run whose weights are averaged, step by step, with what a closed form needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

VOCABULARY, DECAY = 60, 0.7
MODEL = {
    "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "num_query_groups": 2, "num_moe_experts": 4,
    "moe_ffn_hidden_size": 24, "share_embeddings_and_output_weights": True,
}  # fmt: skip


def engine_of(parallel: dict[str, Any], optimizer_cpu_offload: bool = False, model: dict[str, Any] | None = None, **train: Any) -> Any:
    import torch.distributed as dist

    from megalign.config.rules import check
    from megalign.config.schema import Recipe
    from megalign.trainer.engine import Engine
    from megalign.trainer.run import grid_of

    recipe = Recipe.model_validate(
        {"model": {**MODEL, **(model or {})}, "parallel": parallel, "data": {"sequence_length": 32}, "optimizer": {"lr": 1e-2, "optimizer_cpu_offload": optimizer_cpu_offload},
         "train": {"global_batch_size": 4, "ema_decay": DECAY, "eval_ema": True, **train}}
    )  # fmt: skip
    check(recipe, dist.get_world_size())
    return Engine(recipe, grid_of(recipe, None), VOCABULARY)  # pyright: ignore[reportArgumentType]


def step(engine: Any, number: int) -> float:
    from megalign.batch import collate
    from megalign.data.rows import Example
    from megalign.sft import token_loss
    from megalign.trainer.objective import Objective

    numbers = np.random.default_rng(number)
    rows = [Example(numbers.integers(0, VOCABULARY, 30).astype(np.int32), np.arange(30) > 0) for _ in range(4)]
    share = 4 // engine.grid.data.size
    mine = rows[engine.grid.data.rank * share : (engine.grid.data.rank + 1) * share]
    batches = [collate([[row]], sequence_length=32, pad_id=0) for row in mine]
    return engine.train_step(batches, Objective(token_loss), 1e-2 / number, number).loss


def weights(engine: Any) -> dict[str, torch.Tensor]:
    """Full weights on rank 0."""
    from megalign.models.weights import stream_full

    return {name: full.clone() for name, full in stream_full(engine.models, engine.grid)}


def averages(engine: Any) -> dict[str, torch.Tensor]:
    with engine.averaged():
        return weights(engine)


def run(parallel: dict[str, Any], folder: Path, train: dict[str, Any]) -> dict[str, Any]:
    """Six steps; after three a checkpoint, from which a second engine goes on. Full tensors on rank 0."""
    from megalign.parallel.checkpoint import load
    from megalign.parallel.grid import destroy_grid

    engine = engine_of(parallel, **train)
    history, after = [weights(engine)], []
    for number in range(1, 7):
        step(engine, number)
        history.append(weights(engine))
        if number == 3:
            saved = engine.save(folder, 3, {"step": 3}).finish()
    found: dict[str, Any] = {"history": history, "average": averages(engine), "owned": sum(value.numel() for value in engine.shadow.values)}
    found["left"] = weights(engine)
    found["dtypes"] = {value.dtype for value in engine.shadow.values}
    destroy_grid()
    again = engine_of(parallel, **train)
    again.load(saved)
    for number in range(4, 7):
        step(again, number)
    found["resumed"], after = averages(again), weights(again)
    found["resumed_weights"] = after
    again.load(saved, weights_only=True)
    found["loaded"] = weights(again)
    load(saved, again.chunks, None, again.grid)
    found["trained"] = weights(again)
    destroy_grid()
    return {**found, "path": saved}


def open_elsewhere(parallel: dict[str, Any], checkpoint: Path) -> dict[str, torch.Tensor]:
    engine = engine_of(parallel)
    engine.load(checkpoint)
    return averages(engine)


def without_average(folder: Path) -> dict[str, Any]:
    """A checkpoint of a run without an average, opened by one with it: where the average begins, and what is refused."""
    from megalign.parallel.checkpoint import CheckpointError
    from megalign.parallel.grid import destroy_grid

    plain = engine_of({}, ema_decay=None, eval_ema=False)
    step(plain, 1)
    saved = plain.save(folder, 1, {"step": 1}).finish()
    destroy_grid()
    engine = engine_of({})
    engine.load(saved)
    found: dict[str, Any] = {"average": averages(engine), "weights": weights(engine)}
    try:
        engine.load(saved, weights_only=True)
    except CheckpointError as error:
        found["refused"] = str(error)
    return found

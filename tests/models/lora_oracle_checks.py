"""Our LoRA on a Hugging Face folder, in one process: adapters under PEFT's names, their gradients, and some steps of training."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

VOCAB, LENGTH = 128, 32


def rows(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(token ids, which of them are scored) of `count` rows."""
    numbers = np.random.default_rng(3)
    return [(numbers.integers(0, VOCAB, LENGTH).astype(np.int32), (numbers.random(LENGTH) < 0.6) & (np.arange(LENGTH) > 0)) for _ in range(count)]


def ours(folder: str, adapter: str, lora: dict[str, Any], steps: int, optimizer: dict[str, Any]) -> dict[str, Any]:
    """Loss and gradients with random B; then adapters as at the start (random A, B zero), losses and norms of `steps` steps on 2 rows each.

    The adapters before them are left in `adapter` as a PEFT folder.
    """
    from megalign.batch import collate
    from megalign.config.schema import Recipe
    from megalign.data.rows import Example
    from megalign.models.adapters import _initialise
    from megalign.models.hf.registry import family_of_model
    from megalign.models.hf.table import Dimensions
    from megalign.models.peft import _renamed, save_adapter
    from megalign.models.resolve import resolve_model
    from megalign.models.weights import stream_full
    from megalign.parallel.init import read_world
    from megalign.parallel.lora import is_adapter
    from megalign.parallel.optimizer import zero_gradients
    from megalign.sft import token_loss
    from megalign.trainer.engine import Engine
    from megalign.trainer.objective import Objective
    from megalign.trainer.run import grid_of

    given = {"model": {"init_from": folder, "moe_grouped_gemm": False}, "lora": lora, "optimizer": optimizer, "audit": {"interval": None}}
    recipe = resolve_model(Recipe.model_validate(given))
    engine = Engine(recipe, grid_of(recipe, read_world(os.environ)), VOCAB)
    entries = family_of_model(recipe.model).conversion(Dimensions.of(recipe.model, VOCAB)).entries

    def under_peft_names(value: Any) -> dict[str, torch.Tensor]:
        found = dict(_renamed(stream_full(engine.models, engine.grid, value=value, only=is_adapter), entries, torch.float32))
        return {name.removeprefix("base_model.model."): tensor for name, tensor in found.items()}

    batches = [collate([[Example(ids, mask)]], sequence_length=LENGTH, pad_id=0) for ids, mask in rows(max(2, 2 * steps))]
    fill(engine)
    zero_gradients(engine.chunks, engine.optimizer)
    sums, _ = engine._run(batches[:2], Objective(token_loss), forward_only=False)
    result: dict[str, Any] = {"loss": sums.means().loss, "adapters": under_peft_names(lambda p: p.detach()), "grads": under_peft_names(lambda p: p.main_grad)}
    _initialise(engine.models, engine.grid, recipe.train.seed)
    engine.optimizer.reload_model_params()
    if steps:
        save_adapter(Path(adapter), engine.models, recipe.model, recipe.lora, engine.grid, VOCAB, torch.float32)
        results = [engine.train_step(batches[2 * i : 2 * i + 2], Objective(token_loss), recipe.optimizer.lr, i + 1) for i in range(steps)]
        result["steps"] = [(each.loss, each.grad_norm) for each in results]
        result["trained"] = under_peft_names(lambda p: p.detach())
    return result


@torch.no_grad()
def fill(engine: Any) -> None:
    """Every B random."""
    from megalign.models.weights import generator_of, named_parameters

    for name, parameter, _ in named_parameters(engine.models, engine.grid):
        if ".lora_B_" in name:
            parameter.normal_(0, 0.1, generator=generator_of(5, name))


def several(folders: list[str], lora: dict[str, Any]) -> list[dict[str, Any]]:
    """`ours` of several folders, without training."""
    from megalign.parallel.grid import destroy_grid

    found = []
    for folder in folders:
        found.append(ours(folder, "", lora, 0, {}))
        destroy_grid()
    return found

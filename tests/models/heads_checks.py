"""Rewards of a Hugging Face reward model, on this world's layouts."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

VOCAB = 128


def documents() -> list[list[int]]:
    """Token ids of several lengths, 0 (the padding id) among them."""
    numbers = np.random.default_rng(5)
    return [numbers.integers(0 if n % 3 == 0 else 1, VOCAB, 3 + 5 * n).tolist()[:-1] + [7] for n in range(9)]


def rewards(folder: str, layouts: list[dict[str, Any]]) -> list[list[float]]:
    """What a scorer says of `documents`, layout by layout."""
    import torch

    from megalign.config.schema import Recipe
    from megalign.models.pretrained import save_pretrained
    from megalign.models.resolve import resolve_model
    from megalign.parallel.grid import destroy_grid
    from megalign.parallel.init import read_world
    from megalign.rewards.heads import shapes_of
    from megalign.scoring import RewardScorer
    from megalign.trainer.engine import Engine
    from megalign.trainer.run import grid_of

    found = []
    for parallel in layouts:
        recipe = resolve_model(Recipe.model_validate({"model": {"init_from": folder}, "parallel": parallel, "data": {"sequence_length": 64}}))
        grid = grid_of(recipe, read_world(os.environ))
        engine = Engine(recipe, grid, VOCAB, train=False, heads=shapes_of(recipe.rm.heads))
        tokenizer: Any = SimpleNamespace(eod=0)
        scorer = RewardScorer(engine, tokenizer, recipe.rm.heads, {})
        if len(found) < 2:  # one process' layout and a cut one
            target = Path(folder).with_name(f"again-{len(found)}")
            save_pretrained(target, engine.models, recipe.model, grid, VOCAB, None, 3, torch.float32, 0)
        found.append(scorer.values([np.array(ids, np.int32) for ids in documents()])[:, 0].tolist())
        destroy_grid()
    return found

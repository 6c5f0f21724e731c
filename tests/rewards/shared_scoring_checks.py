"""Scores of documents that begin alike, together and one by one, inside a rank."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

LENGTH, VOCABULARY = 96, 64


def scores(documents: list[list[int]], model: dict[str, Any]) -> tuple[list[list[float]], list[float], int, int]:
    """(alone, together; tokens computed alone, and together) under a random model of two layers."""
    import numpy as np
    import torch

    from megalign.config.schema import Recipe
    from megalign.parallel.grid import destroy_grid
    from megalign.parallel.init import read_world
    from megalign.rewards.heads import shapes_of
    from megalign.scoring import RewardScorer
    from megalign.trainer.engine import Engine
    from megalign.trainer.run import grid_of

    shape = dict(num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, init_method_std=0.3)
    recipe = Recipe.model_validate({"model": {**shape, **model}, "data": dict(sequence_length=LENGTH)})
    torch.manual_seed(0)
    engine = Engine(recipe, grid_of(recipe, read_world(os.environ)), VOCABULARY, train=False, heads=shapes_of(recipe.rm.heads))
    tokenizer: Any = SimpleNamespace(eod=0)
    scorer, computed, score = RewardScorer(engine, tokenizer, recipe.rm.heads, {}), [0], engine.score

    def counted(batches: Any, read: Any) -> Any:
        computed[0] += sum(len(batch.tokens) for batch in batches)
        return score(batches, read)

    engine.score = counted  # pyright: ignore[reportAttributeAccessIssue]
    ids = [np.array(document, np.int32) for document in documents]
    alone = [scorer.values([document])[0].tolist() for document in ids]
    one_by_one, computed[0] = computed[0], 0
    together = scorer.values(ids)[:, 0].tolist()
    destroy_grid()
    return alone, together, one_by_one, computed[0]

"""Whole runs of `kto` inside ranks that a fork server started; what they wrote is read by the test."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import dpo_checks


def recipe(output: Path, *, parallel: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A tiny dense model on 30 labelled answers of the built-in grammar; `changes`: section=dict."""
    base = dpo_checks.recipe(output, parallel=parallel)
    base["data"] |= dict(max_rows=30, validation_rows=5, sequence_length=224)
    base["train"] |= dict(micro_batch_size=2, max_steps=8)
    for section, values in changes.items():
        base[section] = {**base.get(section, {}), **values} if isinstance(values, dict) else values
    return base


def train(recipe: dict[str, Any]) -> str:
    """Run it on this world; return "" or the error."""
    from megalign.config.schema import Recipe
    from megalign.kto import kto
    from megalign.parallel.grid import destroy_grid
    from megalign.parallel.init import read_world

    try:
        kto(Recipe.model_validate(recipe), read_world(os.environ))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        destroy_grid()
    return ""


def train_all(recipes: list[dict[str, Any]]) -> list[str]:
    """Several runs one after the other in the same processes; one with "algorithm": "dpo" is a run of `dpo`."""
    return [dpo_checks.train(recipe) if recipe.pop("algorithm", "") == "dpo" else train(recipe) for recipe in recipes]


curve, metrics = dpo_checks.curve, dpo_checks.metrics

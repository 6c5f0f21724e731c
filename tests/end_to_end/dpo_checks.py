"""Whole runs of `dpo` inside ranks that a fork server started; what they wrote is read by the test."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import sft_checks


def recipe(output: Path, *, parallel: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A tiny dense model on 24 pairs of the built-in grammar; `changes`: section=dict."""
    base: dict[str, Any] = {
        "output": str(output),
        "model": dict(num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2),
        "parallel": parallel or {},
        "data": dict(max_rows=24, validation_rows=4, sequence_length=448, tokenizer=dict(vocab_size=300)),
        "optimizer": dict(lr=3e-3, lr_warmup_steps=2),
        "train": dict(micro_batch_size=1, global_batch_size=4, max_steps=6, sample_prompts=1, sample_tokens=4),
        "logging": dict(tensorboard=False, report=False),
    }  # fmt: skip
    for section, values in changes.items():
        base[section] = {**base.get(section, {}), **values} if isinstance(values, dict) else values
    return base


def train(recipe: dict[str, Any]) -> str:
    """Run it on this world; return "" or the error."""
    from megalign.config.schema import Recipe
    from megalign.dpo import dpo
    from megalign.parallel.grid import destroy_grid
    from megalign.parallel.init import read_world

    try:
        dpo(Recipe.model_validate(recipe), read_world(os.environ))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        destroy_grid()
    return ""


def train_all(recipes: list[dict[str, Any]]) -> list[str]:
    """Several runs one after the other in the same processes."""
    return [train(recipe) for recipe in recipes]


def sweep(recipe: dict[str, Any], betas: list[float]) -> None:
    """A run for each beta."""
    from megalign.config.schema import Recipe
    from megalign.parallel.init import read_world
    from megalign.sweep import sweep

    sweep(Recipe.model_validate(recipe), betas, read_world(os.environ))


def implicit(run: str, overrides: list[str]) -> dict[str, list[float]]:
    """Rewards that a run gives to both sides of its validation pairs."""
    from megalign.config.schema import Recipe
    from megalign.data.pairs import KeptPairs, build_pairs, sides
    from megalign.implicit import ImplicitReward
    from megalign.parallel.checkpoint import list_checkpoints, read_meta
    from megalign.parallel.grid import destroy_grid
    from megalign.parallel.init import read_world

    recipe = Recipe(**read_meta(list_checkpoints(Path(run) / "checkpoints")[-1])["recipe"])
    kept = build_pairs(recipe)[1].kept
    assert isinstance(kept, KeptPairs)
    both = [sides(pair) for pair in kept.pairs()]
    rewards = ImplicitReward.load(Path(run), overrides, read_world(os.environ)).score([side for pair in both for side in pair])
    destroy_grid()
    return {"chosen": rewards[0::2].tolist(), "rejected": rewards[1::2].tolist()}


curve, metrics = sft_checks.curve, sft_checks.metrics

"""The sampler of a recipe, and what its dealing costs in padding and waiting."""

from __future__ import annotations

from typing import Any

from megalign.config.schema import Recipe
from megalign.data.balance import shares
from megalign.data.dataset import Dataset
from megalign.data.mixture import MixtureSampler
from megalign.data.sampler import Sampler
from megalign.data.stream import Stream
from megalign.data.stream_sampler import StreamSampler

STEPS_LOOKED_AT = 200


def sampler_of(
    dataset: Dataset,
    recipe: Recipe,
    *,
    data_parallel_rank: int = 0,
    data_parallel_size: int = 1,
    evaluation: bool = False,
    rows: int | None = None,
    balance: bool | None = None,
) -> Sampler:
    """Deals `dataset` to a rank as the recipe says. evaluation: every row once, in order.

    rows: only the first so many. balance: null means as the recipe says.
    """
    data, train = recipe.data, recipe.train
    options: dict[str, Any] = {
        "global_batch_size": train.global_batch_size,
        "micro_batch_size": train.micro_batch_size,
        "data_parallel_rank": data_parallel_rank,
        "data_parallel_size": data_parallel_size,
        "seed": train.seed,
        "shuffle": data.shuffle and not evaluation,
        "balance": balanced(recipe) if balance is None else balance,
    }
    if isinstance(dataset.rows, Stream):
        return StreamSampler(dataset.rows, remainder=data.remainder, **options)
    if dataset.parts and not evaluation:
        return MixtureSampler(
            dataset.parts,
            dataset.tokens,
            curriculum=data.curriculum,
            remainder=data.remainder,
            keep_first_epoch=data.order_by_length,
            **options,
        )
    return Sampler(
        len(dataset) if rows is None else min(rows, len(dataset)),
        tokens=dataset.tokens,
        remainder="pad" if evaluation else data.remainder,
        keep_first_epoch=data.order_by_length,
        **options,
    )


def balanced(recipe: Recipe) -> bool:
    """Whether microbatches are made even: where `data.balance` says nothing, if rows differ in length."""
    return not recipe.data.packing if recipe.data.balance is None else recipe.data.balance


def distribution(dataset: Dataset, recipe: Recipe, data_parallel_size: int, *, padded: bool) -> dict[str, Any]:
    """Padding and waiting of the first steps, in file-and-shuffle order and as the recipe deals them."""
    found = {}
    for name, balance in (("in_order", False), ("dealt", balanced(recipe))):
        sampler = sampler_of(
            dataset, recipe, data_parallel_size=data_parallel_size, balance=balance
        )
        steps = [sampler.tokens_of(sampler.next_global_step()) for _ in range(min(STEPS_LOOKED_AT, sampler.steps_per_epoch))]
        found[name] = shares(steps, recipe.data.sequence_length, padded=padded)
    return {"data_parallel_size": data_parallel_size, "balanced": balanced(recipe), **found}


def describe_distribution(found: dict[str, Any]) -> str:
    """One line for the log."""
    before, after = found["in_order"], found["dealt"]
    line = f"padding is {after['padding_share']:.1%} of the positions; data-parallel ranks wait {after['idle_share']:.1%} of their time"
    if not found["balanced"]:
        return line
    return f"{line} ({before['idle_share']:.1%} before rows were dealt by length)"

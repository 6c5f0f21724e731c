"""Rules of activation recomputation, and which layers it covers (Korthikanti et al. 2022, arXiv:2205.05198)."""

from __future__ import annotations

from collections.abc import Iterator

from megalign.config.errors import Problem
from megalign.config.layout import Layout
from megalign.config.schema import Recipe
from megalign.config.stages import stage_layers

KEYS = ("recompute_method", "recompute_num_layers", "recompute_modules")


def recomputed_modules(recipe: Recipe) -> frozenset[str]:
    """The parts of a layer that are computed again; empty unless `recompute_granularity` is selective."""
    if recipe.train.recompute_granularity != "selective":
        return frozenset()
    given = recipe.train.recompute_modules
    return frozenset(["core_attn"] if given is None else given)


def recompute(recipe: Recipe, layout: Layout) -> Iterator[Problem]:
    """Keys that a granularity does not read are mistakes; groups of layers must fill a stage (megatron-core would
    run past its last layer, transformer_block.py:539); modules must exist in the model."""
    train = recipe.train
    granularity = train.recompute_granularity
    read = {None: (), "full": KEYS[:2], "selective": KEYS[2:]}[granularity]
    for key in KEYS:
        if key not in read and (value := getattr(train, key)) is not None:
            other = "selective" if key == "recompute_modules" else "full"
            fix = f"set it to null, or train.recompute_granularity to {other}"
            yield Problem(f"train.{key}", f"is not read: recompute_granularity is {granularity or 'null'}", fix, value)
    if granularity == "full":
        yield from _full(recipe, layout)
    elif granularity == "selective":
        yield from _modules(recipe, recomputed_modules(recipe))


def _full(recipe: Recipe, layout: Layout) -> Iterator[Problem]:
    method, count = recipe.train.recompute_method, recipe.train.recompute_num_layers
    for key, value, example in (("recompute_method", method, "uniform"), ("recompute_num_layers", count, "1")):
        if value is None:  # transformer_config.py:1166, 1172
            yield Problem(f"train.{key}", "full recomputation needs it", f"set it, e.g. to {example}", None)
    if method is None or count is None:
        return
    chunks = sorted({layers for stage in stage_layers(recipe, layout) for layers in stage if layers})
    most = max(chunks, default=1)
    if method == "block" and count > most:
        yield Problem("train.recompute_num_layers", f"a stage has at most {most} layers", f"lower it to {most}", count)
    if method == "uniform" and (uneven := [layers for layers in chunks if layers % count]):
        rule = f"a stage of {uneven[0]} layers has no whole groups of {count}"
        yield Problem("train.recompute_num_layers", rule, "choose a divisor, e.g. 1", count)


def _modules(recipe: Recipe, modules: frozenset[str]) -> Iterator[Problem]:
    model = recipe.model
    experts = model.num_moe_experts is not None
    latent = bool(getattr(model, "multi_latent_attention", False))
    frequency = getattr(model, "moe_layer_freq", 1)
    dense = not experts or (isinstance(frequency, list) and 0 in frequency) or frequency not in (1, [1])
    absent = {
        "mlp": (not dense, "every layer has experts and none a dense MLP", "name moe instead"),
        "moe": (not experts, "the model has no experts", "name mlp instead"),
        "shared_experts": (not model.moe_shared_expert_intermediate_size, "the model has no shared expert", "take it out"),
        "mla_up_proj": (not latent, "the model has no latent attention", "take it out"),
        # transformer_config.py:1213: our experts are SequentialMLPs
        "moe_act": (True, "needs grouped experts of Transformer Engine", "name moe instead, which covers it"),
    }

    def refuse(rule: str, fix: str) -> Problem:
        return Problem("train.recompute_modules", rule, fix, recipe.train.recompute_modules)

    if not modules:
        yield refuse("selective recomputation of nothing", "name a module, or set recompute_granularity to null")
    for name in sorted(modules):
        missing, rule, fix = absent.get(name, (False, "", ""))
        if missing:
            yield refuse(f"{name}: {rule}", fix)
    if {"moe", "shared_experts"} <= modules:
        yield refuse("moe computes the shared experts again too, shared_experts would do it a third time", "take shared_experts out")

"""Rules of the parallel layout. A rule is a small generator of `Problem`s whose docstring gives the reason; line
numbers are those of megatron-core 0.16.1. `rules.check` runs them all."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megalign.config.errors import Problem, not_a_multiple
from megalign.config.layout import Layout
from megalign.config.schema import Recipe
from megalign.config.stages import pipeline


def world(recipe: Recipe, layout: Layout) -> Iterator[Problem]:
    """Every rank has one place: tp * pp * cp * dp = world (parallel_state.py:741)."""
    model_ranks = layout.tp * layout.pp * layout.cp
    if model_ranks * layout.dp == layout.world:
        return
    given = recipe.parallel.data_parallel_size is not None
    sizes = f"tp({layout.tp}) * pp({layout.pp}) * cp({layout.cp})"
    if layout.world % model_ranks:
        rule = f"{sizes} = {model_ranks} does not divide the {layout.world} ranks of the world"
        fix = f"start a multiple of {model_ranks} ranks, or lower one of the three to a size that divides the world"
        if given:
            fix += ", and remove parallel.data_parallel_size"
    else:
        product = f"{sizes} * dp({layout.dp}) = {model_ranks * layout.dp}"
        rule = f"{product}, but the world has {layout.world} ranks"
        fits = layout.world // model_ranks
        fix = f"{'lower' if fits < layout.dp else 'raise'} parallel.data_parallel_size to {fits}"
    if given:
        yield Problem("parallel.data_parallel_size", rule, fix, recipe.parallel.data_parallel_size)
    else:
        yield Problem("parallel", rule, fix)


def interleaving(recipe: Recipe, layout: Layout) -> Iterator[Problem]:
    """An interleaved schedule works through groups of pp microbatches and refuses a partial one
    (pipeline_parallel/schedules.py:997 and :1008, with microbatch_group_size_per_vp_stage = pp)."""
    count = layout.microbatches
    if layout.vpp > 1 and layout.pp > 1 and count % layout.pp:
        rows = recipe.train.micro_batch_size * layout.dp * layout.pp
        near = -(-recipe.train.global_batch_size // rows) * rows
        rule = f"gives {count} microbatches, and virtual pipeline stages need a multiple of pp({layout.pp})"
        yield Problem("train.global_batch_size", rule, f"set it to {near}", recipe.train.global_batch_size)


def expert_layout(recipe: Recipe, layout: Layout) -> Iterator[Problem]:
    """Experts are cut over their own axes, which fill the same ranks: etp * ep * pp divides the world
    (parallel_state.py:794), every rank holds equally many experts (moe_layer.py:101)."""
    experts = recipe.model.num_moe_experts
    if experts is None:
        for key, value, neutral in (
            ("expert_model_parallel_size", layout.ep, 1),
            ("expert_tensor_parallel_size", recipe.parallel.expert_tensor_parallel_size, None),
        ):
            if value != neutral:  # transformer_config.py:1048
                fix = f"set it to {neutral or 'null'}, or give model.num_moe_experts"
                yield Problem(f"parallel.{key}", "the model has no experts", fix, value)
        return
    ranks = layout.etp * layout.ep * layout.pp
    if layout.world % ranks:
        product = f"etp({layout.etp}) * ep({layout.ep}) * pp({layout.pp}) = {ranks}"
        rule = f"{product} does not divide the {layout.world} ranks of the world"
        both = math.lcm(ranks, layout.tp * layout.pp * layout.cp)
        fix = f"start a multiple of {both} ranks, or lower parallel.expert_model_parallel_size"
        yield Problem("parallel.expert_model_parallel_size", rule, fix, layout.ep)
    if experts % layout.ep:
        what, fix = f"expert_model_parallel_size({layout.ep})", "lower parallel.expert_model_parallel_size"
        yield not_a_multiple("model.num_moe_experts", experts, layout.ep, what, fix)


def sequence_parallel(recipe: Recipe, layout: Layout) -> Iterator[Problem]:
    """It shares out what tensor parallelism repeats, so it needs tp > 1 (model_parallel_config.py:411). Experts
    under tp > 1 need it: each rank would otherwise route every token again (moe_layer.py:379, at the first step)."""
    on = recipe.parallel.sequence_parallel
    if on and layout.tp == 1:
        rule = "needs tensor_model_parallel_size > 1, and it is 1"
        yield Problem("parallel.sequence_parallel", rule, "set it to false", on)
    if not on and layout.tp > 1 and recipe.model.num_moe_experts is not None:
        rule = f"experts under tensor_model_parallel_size({layout.tp}) need sequence parallelism"
        yield Problem("parallel.sequence_parallel", rule, "set it to true", on)


def overlap(recipe: Recipe, layout: Layout) -> Iterator[Problem]:
    """Gathering parameters while the forward runs is a feature of the distributed optimizer, and silently off
    without it (distributed_data_parallel.py:348)."""
    parallel = recipe.parallel
    if parallel.overlap_param_gather and not parallel.use_distributed_optimizer:
        fix = "set parallel.use_distributed_optimizer to true, or this to false"
        yield Problem("parallel.overlap_param_gather", "needs use_distributed_optimizer, which is false", fix, True)


def offload(recipe: Recipe, layout: Layout) -> Iterator[Problem]:
    """What is offloaded is a rank's share of the distributed optimizer; without shares every rank's host cores would step
    all parameters (parallel/offload.py)."""
    if recipe.optimizer.optimizer_cpu_offload and not recipe.parallel.use_distributed_optimizer:
        fix = "set parallel.use_distributed_optimizer to true, or this to false"
        yield Problem("optimizer.optimizer_cpu_offload", "needs use_distributed_optimizer, which is false", fix, True)


RULES = (world, pipeline, interleaving, expert_layout, sequence_parallel, overlap, offload)

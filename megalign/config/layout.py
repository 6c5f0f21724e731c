"""How many ranks stand on each axis, and the sizes that follow from it. Integers only."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megalign.config.schema import ModelConfig, Recipe

VOCAB_MULTIPLE = 128  # rows of the embedding and output tables: GEMMs want such multiples


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes of a run (Megatron's short names) and its microbatches a step.

    tp * pp * cp * dp = world for everything but the experts; etp * ep * expert_dp * pp = world for them.
    `vpp` is the number of model chunks a pipeline rank holds (1: not interleaved).
    """

    world: int
    tp: int
    pp: int
    vpp: int
    cp: int
    dp: int
    ep: int
    etp: int
    expert_dp: int
    microbatches: int


def layout_of(recipe: Recipe, world_size: int | None = None) -> Layout:
    """The layout on `world_size` ranks (None: as many as it needs). Not checked: `rules.check` does that.

    Quotients are rounded down and at least 1, so that an impossible recipe still has a layout to talk about.
    """
    parallel, batch = recipe.parallel, recipe.train
    world = world_size_of(recipe) if world_size is None else world_size
    model_ranks = _model_ranks(recipe)
    dp = parallel.data_parallel_size or max(1, world // model_ranks)
    etp, ep = expert_tensor_parallel_size(recipe), parallel.expert_model_parallel_size
    return Layout(
        world=world,
        tp=parallel.tensor_model_parallel_size,
        pp=parallel.pipeline_model_parallel_size,
        vpp=parallel.virtual_pipeline_model_parallel_size or 1,
        cp=parallel.context_parallel_size,
        dp=dp,
        ep=ep,
        etp=etp,
        expert_dp=max(1, world // (etp * ep * parallel.pipeline_model_parallel_size)),
        microbatches=max(1, batch.global_batch_size // (batch.micro_batch_size * dp)),
    )


def world_size_of(recipe: Recipe) -> int:
    """Ranks that the layout needs when it is started bare.

    tp * pp * cp * dp; where `data_parallel_size` is not given, the least dp (1 without experts) for which
    etp * ep divides tp * cp * dp, because expert parallelism takes its ranks from the data-parallel ones.
    """
    dp = recipe.parallel.data_parallel_size
    if dp is None:
        expert_ranks = expert_tensor_parallel_size(recipe) * recipe.parallel.expert_model_parallel_size
        stage_ranks = _model_ranks(recipe) // recipe.parallel.pipeline_model_parallel_size
        dp = expert_ranks // math.gcd(expert_ranks, stage_ranks)
    return _model_ranks(recipe) * dp


def expert_tensor_parallel_size(recipe: Recipe) -> int:
    """The key if it is given; else 1 with experts, and tensor_model_parallel_size without (nothing to cut)."""
    given = recipe.parallel.expert_tensor_parallel_size
    dense = recipe.model.num_moe_experts is None
    return given or (recipe.parallel.tensor_model_parallel_size if dense else 1)


def layers_with_experts(model: ModelConfig) -> list[bool]:
    """For each layer, whether it is a mixture of experts; a list of the wrong length is refused by `model_rules`."""
    pattern = model.moe_layer_freq
    if model.num_moe_experts is None:
        return [False] * model.num_layers
    if isinstance(pattern, int):
        return [layer % max(1, pattern) == 0 for layer in range(model.num_layers)]
    return [bool(experts) for experts in pattern]


def padded_vocab(vocab_size: int, tensor_parallel_size: int) -> int:
    """Rows of the embedding and output tables: `vocab_size` rounded up to a multiple of 128, and of tp.

    The same for every power of two up to tp 128, so that a checkpoint fits another layout.
    """
    multiple = math.lcm(VOCAB_MULTIPLE, tensor_parallel_size)
    return -(-vocab_size // multiple) * multiple


def sequence_multiple(layout: Layout, sequence_parallel: bool) -> int:
    """What must divide a row's tokens: context parallelism cuts it into 2 * cp chunks, each rank holding one of
    the first and one of the last half so that causal work is even; sequence parallelism cuts a rank's part by tp."""
    return (layout.tp if sequence_parallel else 1) * (2 * layout.cp if layout.cp > 1 else 1)


def effective_batch(recipe: Recipe, layout: Layout) -> str:
    """The rows of one optimizer step with their arithmetic: `micro(4) * microbatches(8) * dp(1) = 32 rows`."""
    micro = recipe.train.micro_batch_size
    rows = micro * layout.microbatches * layout.dp
    return f"micro({micro}) * microbatches({layout.microbatches}) * dp({layout.dp}) = {rows} rows a step"


def scaled_lr(recipe: Recipe, data_parallel_size: int) -> float:
    """The peak learning rate after `optimizer.scale_lr_with_data_parallel`: lr, lr * dp or lr * sqrt(dp)."""
    factor = {"none": 1.0, "linear": float(data_parallel_size), "sqrt": math.sqrt(data_parallel_size)}
    return recipe.optimizer.lr * factor[recipe.optimizer.scale_lr_with_data_parallel]


def total_steps(recipe: Recipe, rows: int | None) -> int | None:
    """Optimizer steps of the run: `train.max_steps`, else epochs over `rows` packed rows; None if unknown.

    An epoch has ceil(rows / global_batch_size) steps when the remainder is padded, floor when it is dropped.
    """
    if recipe.train.max_steps is not None or rows is None:
        return recipe.train.max_steps
    batch = recipe.train.global_batch_size
    steps_per_epoch = -(-rows // batch) if recipe.data.remainder == "pad" else rows // batch
    return math.ceil(recipe.train.epochs * steps_per_epoch - 1e-9)  # 1.1 * 50 = 55.00000000000001


def _model_ranks(recipe: Recipe) -> int:
    parallel = recipe.parallel
    return (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )

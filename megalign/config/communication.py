"""Bytes that one rank communicates in a training step, by axis and collective.

Sizes follow from the layers (tensor and sequence parallelism: Korthikanti et al. 2022, arXiv:2205.05198, section 4.2),
from the schedule and from the optimizer. A ring of n ranks sends 2 (n - 1)/n of an all-reduced tensor, (n - 1)/n
of a gathered, scattered or exchanged one. Left out: scalars, counts of tokens an expert, gradient norms.

# T tokens of a microbatch on a rank before sequence parallelism cuts them, D hidden size
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megalign.config.activations import FP32, has_experts, head_sizes, width_of
from megalign.config.layout import Layout
from megalign.config.memory import prediction_numbers, replicated_parameters, stage_numbers, stage_parameters
from megalign.config.recompute import recomputed_modules
from megalign.config.schema import Recipe

Axis = Literal["tensor", "pipeline", "context", "data", "expert", "expert_tensor", "expert_data"]
Operation = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]


@dataclass(frozen=True)
class Traffic:
    """`payload`: bytes a step of whole tensors: all-reduced, gathered, before scattering, exchanged, or sent."""

    axis: Axis
    operation: Operation
    why: str
    payload: float
    ranks: int

    @property
    def sent(self) -> float:
        """Bytes that leave this rank."""
        share = {"all_reduce": 2.0, "send": 0.0}.get(self.operation, 1.0) * (self.ranks - 1) / self.ranks
        return self.payload * (1.0 if self.operation == "send" else share)


def traffic_of(recipe: Recipe, layout: Layout, rows: int, stage: int, *, rows_a_microbatch: int = 1, scored: float = 1.0) -> list[Traffic]:
    """Everything that one rank of the stage communicates in a step. rows: padded vocabulary. scored: share of tokens."""
    tokens = recipe.train.micro_batch_size * rows_a_microbatch * recipe.data.sequence_length // layout.cp
    found = [
        *_tensor(recipe, layout, stage, tokens, scored),
        *_experts(recipe, layout, stage, tokens),
        *_context(recipe, layout, stage, tokens),
        *_pipeline(recipe, layout, stage, tokens),
        *_gradients(recipe, layout, rows, stage),
    ]
    return [traffic for traffic in found if traffic.ranks > 1 and traffic.payload]


def _tensor(recipe: Recipe, layout: Layout, stage: int, tokens: int, scored: float) -> Iterator[Traffic]:
    """A column-parallel and a row-parallel matmul each side: with sequence parallelism a gather before and a scatter
    after, mirrored in backward, where the gathered input is gathered once more for the weight gradient."""
    if layout.tp == 1:
        return
    model, m, numbers = recipe.model, layout.microbatches, stage_numbers(recipe, layout, stage)
    size = tokens * model.hidden_size * width_of(recipe) * m
    modules, again = recomputed_modules(recipe), _recomputed_layers(recipe, layout, len(numbers))
    pairs = repeated = 0.0  # (column, row) pairs a microbatch; those whose forward runs twice
    for number in numbers:
        experts = has_experts(model, number)
        second = bool(model.moe_shared_expert_intermediate_size) if experts else True
        pairs += 1 + second
        once_more = {"moe", "shared_experts"} & modules if experts else {"mlp"} & modules
        repeated += (1 + second) * again + (1 if second and once_more else 0)
    modules = len(prediction_numbers(recipe, layout, stage))
    ends = (stage == 0) + (stage == layout.pp - 1) + 2 * modules  # embedding, head; a prediction module needs both
    if recipe.parallel.sequence_parallel:
        yield Traffic("tensor", "all_gather", "layers", size * (3 * pairs + repeated), layout.tp)
        yield Traffic("tensor", "reduce_scatter", "layers", size * (2 * pairs + repeated), layout.tp)
        yield Traffic("tensor", "all_gather", "embedding and head", size * ends, layout.tp)
        yield Traffic("tensor", "reduce_scatter", "embedding and head", size * ends, layout.tp)
        # [embedding; hidden] is gathered, for the weight gradient once more; the output too, and its gradient.
        yield Traffic("tensor", "all_gather", "prediction modules", size * 6 * modules, layout.tp)
        yield Traffic("tensor", "reduce_scatter", "prediction modules", size * 2 * modules, layout.tp)
    else:
        yield Traffic("tensor", "all_reduce", "layers", size * (2 * pairs + repeated), layout.tp)
        yield Traffic("tensor", "all_reduce", "embedding and head", size * ends, layout.tp)
        yield Traffic("tensor", "all_reduce", "prediction modules", size * 2 * modules, layout.tp)
        yield Traffic("tensor", "all_gather", "prediction modules", size * modules, layout.tp)
    if stage == layout.pp - 1:
        yield Traffic("tensor", "all_reduce", "softmax statistics", 3 * FP32 * tokens * scored * m * (1 + modules), layout.tp)


def _experts(recipe: Recipe, layout: Layout, stage: int, tokens: int) -> Iterator[Traffic]:
    """Dispatch and combine, forward and backward: hidden states both ways, probabilities one way."""
    model, width = recipe.model, width_of(recipe)
    numbers = stage_numbers(recipe, layout, stage)
    layers = sum(has_experts(model, number) for number in numbers)
    again = 1.0 if "moe" in recomputed_modules(recipe) else _recomputed_layers(recipe, layout, len(numbers))
    own = tokens / (layout.tp if recipe.parallel.sequence_parallel else 1)
    choices = own * model.moe_router_topk * layers * layout.microbatches
    hidden, probabilities = choices * model.hidden_size * width, choices * FP32
    if model.moe_token_dispatcher_type != "allgather":
        yield Traffic("expert", "all_to_all", "tokens to experts and back", (2 * hidden + probabilities) * (2 + again), layout.ep)
        etp = layout.etp
        yield Traffic("expert_tensor", "all_gather", "tokens of one expert", etp * ((hidden + probabilities) * (1 + again) + hidden), etp)
        yield Traffic("expert_tensor", "reduce_scatter", "tokens of one expert", etp * (hidden * (1 + again) + hidden + probabilities), etp)
    else:
        ranks = layout.ep * layout.etp
        everyone = own * ranks * layers * layout.microbatches
        hidden, probabilities = everyone * model.hidden_size * width, everyone * (model.num_moe_experts or 0) * FP32
        yield Traffic("expert", "all_gather", "tokens to every rank", (hidden + probabilities) * (1 + again) + hidden, ranks)
        yield Traffic("expert", "reduce_scatter", "tokens to every rank", hidden * (1 + again) + hidden + probabilities, ranks)


def _context(recipe: Recipe, layout: Layout, stage: int, tokens: int) -> Iterator[Traffic]:
    """Keys and values of the whole row on every rank; their gradients scattered back."""
    _, groups, key, value = head_sizes(recipe.model)
    numbers = stage_numbers(recipe, layout, stage)
    size = tokens * layout.cp * max(1, groups // layout.tp) * (key + value) * width_of(recipe) * layout.microbatches * len(numbers)
    again = 1.0 if "core_attn" in recomputed_modules(recipe) else _recomputed_layers(recipe, layout, len(numbers))
    yield Traffic("context", "all_gather", "keys and values", size * (1 + again), layout.cp)
    yield Traffic("context", "reduce_scatter", "their gradients", size, layout.cp)


def _pipeline(recipe: Recipe, layout: Layout, stage: int, tokens: int) -> Iterator[Traffic]:
    """Hidden states to the next chunk, their gradients to the one before."""
    own = tokens / (layout.tp if recipe.parallel.sequence_parallel else 1)
    size = own * recipe.model.hidden_size * width_of(recipe) * layout.microbatches
    yield Traffic("pipeline", "send", "hidden states", size * (layout.vpp - (stage == layout.pp - 1)), layout.pp)
    yield Traffic("pipeline", "send", "their gradients", size * (layout.vpp - (stage == 0)), layout.pp)


def _gradients(recipe: Recipe, layout: Layout, rows: int, stage: int) -> Iterator[Traffic]:
    """Once a step: FP32 gradients to their owners and weights back, or all-reduced where every rank owns all.

    With experts megatron-core chains two optimizers, and each gathers the weights of both (distrib_optimizer.py:2618).
    Under sequence parallelism norms and routers saw a part of the sequence: their gradients are summed (finalize_model_grads).
    """
    model, width = recipe.model, width_of(recipe)
    dense, experts = stage_parameters(recipe, layout, rows, stage)
    gathers = 2 if experts and not recipe.parallel.overlap_param_gather else 1
    owners: tuple[tuple[Axis, int, int], ...] = (("data", dense, layout.dp * layout.cp), ("expert_data", experts, layout.expert_dp))
    for axis, count, ranks in owners:
        if recipe.parallel.use_distributed_optimizer:
            yield Traffic(axis, "reduce_scatter", "gradients", count * FP32, ranks)
            yield Traffic(axis, "all_gather", "weights", count * width * gathers, ranks)
        else:
            yield Traffic(axis, "all_reduce", "gradients", count * FP32, ranks)
    if recipe.parallel.sequence_parallel:
        yield Traffic("tensor", "all_reduce", "gradients of norms and routers", replicated_parameters(recipe, layout, rows, stage) * FP32, layout.tp)
    if (model.share_embeddings_and_output_weights or model.mtp_num_layers) and stage in (0, layout.pp - 1) and layout.pp > 1:
        yield Traffic("pipeline", "all_reduce", "gradient of the table on two stages", rows // layout.tp * model.hidden_size * FP32, 2)


def _recomputed_layers(recipe: Recipe, layout: Layout, layers: int) -> float:
    """Share of a stage's layers whose whole forward runs twice."""
    train = recipe.train
    if train.recompute_granularity != "full" or not layers:
        return 0.0
    if train.recompute_method == "uniform":
        return 1.0
    return min(1.0, (train.recompute_num_layers or 0) * layout.vpp / layers)

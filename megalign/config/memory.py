"""Memory of a rank by part, before anything is built: `megalign plan`, `--dry-run`.

Peak of a training step = weights + gradients + masters + moments + the activations in flight, and what an algorithm
keeps besides: frozen models, a critic, the KV cache of its rollouts. Framework, communication buffers, gradients of
activations and fragmentation come on top.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

from megalign.config.activations import (
    FP32,
    has_experts,
    head_bytes,
    head_sizes,
    kept_bytes,
    prediction_bytes,
    width_of,
)
from megalign.config.adapters import rank_adapters
from megalign.config.layout import Layout, layers_with_experts, layout_of, padded_vocab
from megalign.config.recompute import recomputed_modules
from megalign.config.schema import ModelConfig, Recipe
from megalign.config.size import count_parameters, layer_parameters, prediction_parameters
from megalign.config.stages import stage_layers

Algorithm = Literal["sft", "dpo", "ppo", "grpo"]
# Models besides the policy: trained ones cost as much as it, frozen ones their weights.
FROZEN: dict[str, tuple[str, ...]] = {"sft": (), "dpo": ("reference",), "ppo": ("reference", "reward"), "grpo": ("reference",)}
TRAINED: dict[str, tuple[str, ...]] = {"sft": (), "dpo": (), "ppo": ("critic",), "grpo": ()}
ROWS = {"dpo": 2}  # a pair is a chosen and a rejected row


def models_of(algorithm: Algorithm, reward_model: bool = False, recipe: Recipe | None = None) -> list[str]:
    """The models in memory: PPO 4, DPO 2, GRPO 2 with a verifier and 3 with a reward model; DPO 1 whose reference is the base of its adapters."""
    more = ("reward",) if reward_model and "reward" not in FROZEN[algorithm] else ()
    frozen = () if algorithm == "dpo" and recipe is not None and recipe.dpo.reference == "base" else FROZEN[algorithm]
    return ["policy", *TRAINED[algorithm], *frozen, *more]


def memory_per_rank(
    recipe: Recipe,
    vocab_size: int,
    world_size: int | None = None,
    *,
    algorithm: Algorithm = "sft",
    reward_model: bool = False,
    device: str = "cuda",
    scored: float = 1.0,
) -> list[dict[str, int]]:
    """What one rank of each pipeline stage holds while training, in bytes; one dict a stage.

    vocab_size: of the tokenizer (the padding to `padded_vocab` is done here). scored: share of the tokens that are
    scored, for the head. device: "cpu" counts what torch's CPU operations keep.

    parameters   count of elements on the rank (not bytes)
    weights      in train.precision
    gradients    FP32 whatever the precision
    masters      FP32 copies of BF16 weights (FP32 weights are their own masters)
    moments      Adam's two, FP32
    average      of the weights (train.ema_decay), FP32
    activations  kept for backward at the peak of the schedule, with what `train.recompute_*` leaves
    host         masters, moments and average in host memory, with optimizer.optimizer_cpu_offload; not in the total
    critic, reference, reward   of the algorithm, of the policy's shape: a critic is trained, the others are weights
    kv_cache     of `global_batch_size / dp` sequences a rank (ppo and grpo), which do not live while the step trains
    total        the sum, of activations and kv_cache the larger

    With the distributed optimizer masters and moments are spread over the dp * cp ranks that hold the same weights,
    those of experts over the expert-data-parallel ranks. With adapters (lora.rank) the weights of the model are weights alone:
    gradients, masters, moments and average are those of the adapters, and `adapters` counts their elements.
    """
    layout = layout_of(recipe, world_size)
    rows = padded_vocab(vocab_size, layout.tp)
    models = models_of(algorithm, reward_model, recipe)
    return [_stage(recipe, layout, rows, stage, models, algorithm, device, scored) for stage in range(layout.pp)]


def _stage(
    recipe: Recipe, layout: Layout, rows: int, stage: int, models: list[str], algorithm: Algorithm, device: str, scored: float
) -> dict[str, int]:
    dense, experts = stage_parameters(recipe, layout, rows, stage)
    sharded = recipe.parallel.use_distributed_optimizer
    added = rank_adapters(recipe, layout, stage_numbers(recipe, layout, stage))
    trained, trained_experts = added if recipe.lora.rank is not None else (dense, experts)
    owned = trained // (layout.dp * layout.cp) + trained_experts // layout.expert_dp if sharded else trained + trained_experts
    on_host = recipe.optimizer.optimizer_cpu_offload
    masters = owned * FP32 if recipe.train.precision == "bf16" or on_host else 0
    average = owned * FP32 if recipe.train.ema_decay is not None else 0
    memory = {
        "weights": (dense + experts + sum(added)) * width_of(recipe),
        "gradients": (trained + trained_experts) * FP32,
        "masters": 0 if on_host else masters,
        "moments": 0 if on_host else owned * 2 * FP32,
        "average": 0 if on_host else average,
        "activations": peak_activations(recipe, layout, rows, stage, ROWS.get(algorithm, 1), device, scored),
    }
    states = sum(memory[part] for part in ("weights", "gradients", "masters", "moments", "average"))
    frozen = (dense + experts) * width_of(recipe)
    others = {name: states if name in TRAINED[algorithm] else frozen for name in models[1:]}
    cache = {"kv_cache": _kv_cache(recipe, layout, stage)} if algorithm in ("ppo", "grpo") else {}
    host = {"host": masters + owned * 2 * FP32 + average} if on_host else {}
    total = states + sum(others.values()) + max(memory["activations"], *cache.values(), 0)
    adapters = {"adapters": sum(added)} if recipe.lora.rank is not None else {}
    return {"stage": stage, "parameters": dense + experts + sum(added), **adapters, **memory, **others, **cache, **host, "total": total}


def stage_parameters(recipe: Recipe, layout: Layout, rows: int, stage: int) -> tuple[int, int]:
    """(all but the experts, experts) that one rank of the stage holds."""
    model = recipe.model
    layers, outside = _parts(model.model_dump_json(), rows)
    first, last = stage == 0, stage == layout.pp - 1
    dense = tables(recipe, layout, stage) * rows // layout.tp * model.hidden_size
    dense += outside.get("positions", 0) if first else 0
    dense += sum(count for part, count in outside.items() if part not in ("embedding", "positions", "output")) if last else 0
    latent = _replicated_attention(model)
    experts = 0
    for number in stage_numbers(recipe, layout, stage):
        for part, count in layers[number].items():
            if part == "experts":
                experts += count // (layout.etp * layout.ep)
            elif part == "attention":
                dense += (count - latent) // layout.tp + latent
            else:
                dense += count // (layout.tp if part in ("mlp", "shared_experts", "projection") else 1)
    return dense, experts


def tables(recipe: Recipe, layout: Layout, stage: int) -> int:
    """Vocabulary tables of a stage: the embedding on the first, the output on the last. A tied output is the embedding,
    on another stage a copy of it; prediction modules have a copy of the embedding there."""
    model, first, last = recipe.model, stage == 0, stage == layout.pp - 1
    if not last:
        return int(first)
    return 1 + int(not model.share_embeddings_and_output_weights and (first or bool(model.mtp_num_layers)))


def replicated_parameters(recipe: Recipe, layout: Layout, rows: int, stage: int) -> int:
    """Norms and routers of a stage: whole on every tensor rank."""
    layers, outside = _parts(recipe.model.model_dump_json(), rows)
    inside = sum(layers[number].get(part, 0) for number in stage_numbers(recipe, layout, stage) for part in ("norms", "router"))
    return inside + (outside.get("norms", 0) if stage == layout.pp - 1 else 0)


def stage_numbers(recipe: Recipe, layout: Layout, stage: int) -> list[int]:
    """Numbers (from 0) of the layers of a stage, in the order of its chunks.

    The layers inside prediction modules, on the last stage, are numbered behind the model's own.
    """
    counts, numbers, at = stage_layers(recipe, layout), [], 0
    for chunk in range(layout.vpp):
        for other in range(layout.pp):
            if other == stage:
                numbers += range(at, at + counts[other][chunk])
            at += counts[other][chunk]
    numbers = [number for number in numbers if number < recipe.model.num_layers]
    return numbers + prediction_numbers(recipe, layout, stage)


def prediction_numbers(recipe: Recipe, layout: Layout, stage: int) -> list[int]:
    """Those of them that stand inside prediction modules."""
    layers, modules = recipe.model.num_layers, recipe.model.mtp_num_layers or 0
    return list(range(layers, layers + modules)) if stage == layout.pp - 1 else []


@lru_cache(maxsize=64)
def _parts(dumped: str, rows: int) -> tuple[list[dict[str, int]], dict[str, int]]:
    """Parameters by part of each layer, prediction modules behind them, and of what stands outside the layers."""
    model = ModelConfig.model_validate_json(dumped)
    layers = [layer_parameters(model, experts=experts) for experts in layers_with_experts(model)]
    outside = count_parameters(model, rows).by_part
    outside = {part: count - sum(layer.get(part, 0) for layer in layers) for part, count in outside.items() if part != "mtp"}
    layers += [prediction_parameters(model)] * (model.mtp_num_layers or 0)
    return layers, {part: count for part, count in outside.items() if count > 0}


def _replicated_attention(model: ModelConfig) -> int:
    """Latent attention's down projections stand whole on every tensor rank."""
    if not getattr(model, "multi_latent_attention", False):
        return 0
    ranks = (getattr(model, "q_lora_rank", None) or 0) + getattr(model, "kv_lora_rank", 0) + getattr(model, "qk_pos_emb_head_dim", 0)
    return model.hidden_size * ranks


def in_flight(layout: Layout, stage: int) -> float:
    """Microbatches of the whole stage whose activations are kept at the peak of the schedule.

    One forward, one backward has min(pp - stage, microbatches) of them (Narayanan et al. 2021, arXiv:2104.04473), the
    interleaved schedule 2 (pp - stage - 1) + (vpp - 1) pp + 1 chunks (megatron-core's schedules.py:773, 774).
    """
    if layout.vpp == 1:
        return min(layout.pp - stage, layout.microbatches)
    chunks = 2 * (layout.pp - stage - 1) + (layout.vpp - 1) * layout.pp + 1
    return min(chunks, layout.microbatches * layout.vpp) / layout.vpp


def peak_activations(
    recipe: Recipe, layout: Layout, rows: int, stage: int, rows_a_microbatch: int = 1, device: str = "cuda", scored: float = 1.0
) -> int:
    """Bytes kept for backward at the peak of the pipeline schedule.

    The peak comes in the oldest microbatch's backward, when all in flight still hold what they keep: at its start, with
    the head, or later, when the head is gone and a part that is computed again holds everything once.
    """
    model, train = recipe.model, recipe.train
    tokens = train.micro_batch_size * rows_a_microbatch * recipe.data.sequence_length // layout.cp
    numbers = stage_numbers(recipe, layout, stage)
    flying = in_flight(layout, stage)
    whole = {experts: kept_bytes(recipe, layout, _example(model, experts), frozenset(), device) for experts in _kinds(model, numbers)}
    full = [whole[has_experts(model, number)] for number in numbers]
    boundary = width_of(recipe) * model.hidden_size / (layout.tp if recipe.parallel.sequence_parallel else 1)
    group = train.recompute_num_layers or 1
    if train.recompute_granularity == "full" and train.recompute_method == "uniform":
        one = len(full) / group * boundary
        again = max((sum(full[at : at + group]) for at in range(0, len(full), group)), default=0.0)
    elif train.recompute_granularity == "full":
        per_chunk = len(full) // layout.vpp or 1  # the first layers of EACH chunk
        stays = sum(value for at, value in enumerate(full) if at % per_chunk >= group)
        one = sum(1 for at in range(len(full)) if at % per_chunk < group) * boundary + stays
        # When a recomputed layer is reached, this microbatch's kept layers are gone.
        again = max(full, default=0.0) - stays
    else:
        modules = recomputed_modules(recipe)
        less = {experts: kept_bytes(recipe, layout, _example(model, experts), modules, device) for experts in whole}
        one = sum(less[has_experts(model, number)] for number in numbers)
        again = max((whole[experts] - less[experts] for experts in whole), default=0.0)
    head = head_bytes(recipe, layout, rows, tokens, scored) if stage == layout.pp - 1 else 0
    modules = len(prediction_numbers(recipe, layout, stage))
    uniform = train.recompute_granularity == "full" and train.recompute_method == "uniform"
    one += modules * prediction_bytes(recipe, layout, recomputed=uniform)
    if modules:  # the last module is computed again while the heads before its own still hold their logits
        last = full[-1] + prediction_bytes(recipe, layout) if uniform else again
        head = max((1 + modules) * head, modules * head + int(tokens * last) * (again > 0))
    return int(tokens * flying * one + max(tokens * again, head))


def _kinds(model: ModelConfig, numbers: list[int]) -> set[bool]:
    return {has_experts(model, number) for number in numbers}


def _example(model: ModelConfig, experts: bool) -> int:
    """Number of a layer with, or without, experts."""
    return next(number for number in range(model.num_layers) if has_experts(model, number) == experts)


def _kv_cache(recipe: Recipe, layout: Layout, stage: int) -> int:
    """Keys and values of every position of the sequences that a rank answers at once: a rank's share of the batch."""
    heads, groups, key, value = head_sizes(recipe.model)
    sequences = max(1, recipe.train.global_batch_size // layout.dp)
    groups = max(1, groups // layout.tp)
    layers = len(stage_numbers(recipe, layout, stage)) - len(prediction_numbers(recipe, layout, stage))
    return layers * sequences * recipe.data.sequence_length * groups * (key + value) * width_of(recipe)

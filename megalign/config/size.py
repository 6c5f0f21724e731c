"""Parameters of a model and the memory of a rank, in closed form: nothing is built and nothing is loaded.

# D hidden size, H query heads, G key/value heads, K head size, F width of an MLP, E experts, V vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass

from megalign.config.layout import Layout, layout_of, padded_vocab
from megalign.config.schema import ModelConfig, Recipe

FP32 = 4  # bytes


@dataclass(frozen=True)
class Counts:
    """Parameters of a whole model. `total` is the sum of `by_part`.

    `active` counts what one token is computed with: all of `total` except the experts that its router does not
    choose. The embedding and output tables count whole (Mixtral's 12.9B and Qwen3's 3.3B are counted so).
    """

    total: int
    active: int
    by_part: dict[str, int]


@dataclass(frozen=True)
class _Layer:
    """Parameters of one transformer layer, by the way they are cut."""

    attention: int  # query, key, value and output projections: over tp
    mlp: int  # dense MLP: over tp
    shared_expert: int  # over tp
    experts: int  # over etp * ep
    router: int  # on every rank
    norms: int  # on every rank


def count_parameters(model: ModelConfig, vocab_size: int) -> Counts:
    """Parameters of `model` with `vocab_size` rows in its tables (`padded_vocab` for what a run holds).

    Agrees with the published totals: Llama-3 8.03B and 70.55B, Qwen3-30B-A3B 30.53B, Mixtral-8x7B 46.70B.
    """
    layer, layers = _layer(model), model.num_layers
    table = vocab_size * model.hidden_size
    parts = {
        "embedding": table,
        "attention": layers * layer.attention,
        "mlp": layers * layer.mlp,
        "router": layers * layer.router,
        "experts": layers * layer.experts,
        "shared_experts": layers * layer.shared_expert,
        "norms": layers * layer.norms + model.hidden_size,
        "output": 0 if model.share_embeddings_and_output_weights else table,
    }
    total = sum(parts.values())
    idle = 0
    if model.num_moe_experts:
        idle = parts["experts"] // model.num_moe_experts * (model.num_moe_experts - model.moe_router_topk)
    return Counts(total, total - idle, {part: count for part, count in parts.items() if count})


def memory_per_rank(recipe: Recipe, vocab_size: int, world_size: int | None = None) -> list[dict[str, int]]:
    """What one rank of each pipeline stage holds while training, in bytes; one dict a stage.

    vocab_size: of the tokenizer (the padding to `padded_vocab` is done here).

    parameters   count of elements on the rank (not bytes)
    weights      in train.precision
    gradients    FP32 whatever the precision
    masters      FP32 copies of BF16 weights (FP32 weights are their own masters)
    moments      Adam's two, FP32
    activations  an ESTIMATE: see `_activations`
    total        their sum; framework, communication buffers and fragmentation come on top

    With the distributed optimizer masters and moments are spread over the dp * cp ranks that hold the same weights,
    those of experts over the expert-data-parallel ranks.
    """
    layout = layout_of(recipe, world_size)
    rows = padded_vocab(vocab_size, layout.tp)
    return [_stage(recipe, layout, rows, stage) for stage in range(layout.pp)]


def _stage(recipe: Recipe, layout: Layout, rows: int, stage: int) -> dict[str, int]:
    model, layer = recipe.model, _layer(recipe.model)
    first, last = stage == 0, stage == layout.pp - 1
    tied = model.share_embeddings_and_output_weights
    # A tied table exists on the first stage and, as a copy for the output, on the last.
    tables = int(first) + int(last and not (tied and first))
    layers = model.num_layers // layout.pp
    per_layer = (layer.attention + layer.mlp + layer.shared_expert) // layout.tp + layer.router + layer.norms
    dense = layers * per_layer + tables * rows // layout.tp * model.hidden_size
    dense += model.hidden_size if last else 0  # the norm before the output
    experts = layers * layer.experts // (layout.etp * layout.ep)

    sharded = recipe.parallel.use_distributed_optimizer
    owned = dense // (layout.dp * layout.cp) + experts // layout.expert_dp if sharded else dense + experts
    memory = {
        "weights": (dense + experts) * _width(recipe),
        "gradients": (dense + experts) * FP32,
        "masters": owned * FP32 if recipe.train.precision == "bf16" else 0,
        "moments": owned * 2 * FP32,
        "activations": _activations(recipe, layout, rows, stage),
    }
    return {"stage": stage, "parameters": dense + experts, **memory, "total": sum(memory.values())}


def _activations(recipe: Recipe, layout: Layout, rows: int, stage: int) -> int:
    """Estimated bytes kept for backward at the peak of the pipeline schedule.

    Counted a token and layer: the inputs of both norms and of every matmul, queries and keys before and after
    RoPE, values, attention's output (attention keeps no S x S matrix), gate, up, silu(gate) and their product; for
    experts the last four once a choice, with balanced routing. Matmul outputs are cut over tp, the rest only
    under sequence parallelism. One forward, one backward has min(pp - stage, microbatches) of them in flight, the
    interleaved schedule 2 (pp - stage - 1) + (vpp - 1) pp + 1 chunks (megatron's schedules.py:773, 774). The last
    stage adds its logits, once in the training precision and twice in FP32 (softmax and its gradient).
    """
    model = recipe.model
    heads, groups, channels = _attention_shape(model)
    tokens = recipe.train.micro_batch_size * recipe.data.sequence_length // layout.cp
    whole = layout.tp if recipe.parallel.sequence_parallel else 1  # what the full-width tensors are cut by
    per_token = 4 * model.hidden_size / whole + (3 * heads + 3 * groups) * channels / layout.tp
    if model.num_moe_experts is None:
        per_token += 4 * model.ffn_hidden_size / layout.tp
    else:
        width = model.moe_ffn_hidden_size or model.ffn_hidden_size
        # Tokens of a rank, permuted and (over etp) gathered; each rank of etp holds a slice of the width.
        choices = model.moe_router_topk / whole
        per_token += choices * (2 * layout.etp * model.hidden_size + 4 * width)
        per_token += 4 * (model.moe_shared_expert_intermediate_size or 0) / layout.tp
    layers_in_flight = model.num_layers // layout.pp * min(layout.pp - stage, layout.microbatches)
    if layout.vpp > 1:
        chunks = 2 * (layout.pp - stage - 1) + (layout.vpp - 1) * layout.pp + 1
        chunks = min(chunks, layout.microbatches * layout.vpp)
        layers_in_flight = chunks * model.num_layers // (layout.pp * layout.vpp)
    logits = tokens * rows // layout.tp * (_width(recipe) + 2 * FP32) if stage == layout.pp - 1 else 0
    return int(tokens * per_token * layers_in_flight * _width(recipe)) + logits


def _layer(model: ModelConfig) -> _Layer:
    heads, groups, channels = _attention_shape(model)
    width = model.hidden_size
    swiglu = 3 * width  # gate, up and down, a unit of inner width
    experts = model.num_moe_experts or 0
    return _Layer(
        attention=width * channels * (2 * heads + 2 * groups),
        mlp=0 if experts else swiglu * model.ffn_hidden_size,
        shared_expert=swiglu * (model.moe_shared_expert_intermediate_size or 0),
        experts=experts * swiglu * (model.moe_ffn_hidden_size or model.ffn_hidden_size),
        router=experts * width,
        norms=2 * width + (2 * channels if model.qk_layernorm else 0),
    )


def _attention_shape(model: ModelConfig) -> tuple[int, int, int]:
    """H, G, K."""
    heads = model.num_attention_heads
    return heads, model.num_query_groups or heads, model.kv_channels or model.hidden_size // heads


def _width(recipe: Recipe) -> int:
    """Bytes of one weight or activation."""
    return {"fp32": 4, "bf16": 2}[recipe.train.precision]

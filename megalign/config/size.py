"""Parameters of a model in closed form: nothing is built and nothing is loaded.

# D hidden size, H query heads, G key/value heads, K head size, F width of an MLP, E experts, V vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass

from megalign.config.schema import ModelConfig


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


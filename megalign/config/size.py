"""Parameters of a model in closed form: nothing is built and nothing is loaded.

# by_part: attention, mlp and shared_experts are cut over tp (MLA's down projections apart), experts over etp and ep,
# embedding and output over tp; router, norms and positions stand on every tensor rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from megalign.config.layout import layers_with_experts
from megalign.config.schema import ModelConfig


@dataclass(frozen=True)
class Counts:
    """Parameters of a whole model. `total` is the sum of `by_part`.

    `active` counts what one token is computed with when text is written: all of `total` except the experts that its
    router does not choose, and the prediction modules (part `mtp`), which only training uses. The embedding and output
    tables count whole (Mixtral's 12.9B and Qwen3's 3.3B are counted so).
    """

    total: int
    active: int
    by_part: dict[str, int]


def count_parameters(model: ModelConfig, vocab_size: int) -> Counts:
    """Parameters of `model` with `vocab_size` rows in its tables (`padded_vocab` for what a run holds).

    Agrees with the published totals: Llama-3 8.03B and 70.55B, Qwen3-30B-A3B 30.53B, Mixtral-8x7B 46.70B,
    DeepSeek-V3 671.03B without its prediction module, which has 11.6B more and shares embedding and head (a copy of
    both on the hub makes it 685B). The routers' expert biases are no parameters and are not counted.
    """
    layers = layers_with_experts(model)
    dense, experts = (layer_parameters(model, experts=kind) for kind in (False, True))
    table = vocab_size * model.hidden_size
    inside = {part: layers.count(False) * dense.get(part, 0) + layers.count(True) * experts.get(part, 0) for part in dense | experts}
    parts = {
        "embedding": table,
        "positions": model.hidden_size * model.max_position_embeddings if model.position_embedding_type == "learned_absolute" else 0,
        **{part: inside[part] for part in ("attention", "mlp", "router", "experts", "shared_experts") if part in inside},
        "norms": inside["norms"] + _norm(model),
        "output": 0 if model.share_embeddings_and_output_weights else table,
        "mtp": sum(prediction_parameters(model).values()) * (model.mtp_num_layers or 0),
    }
    total = sum(parts.values())
    return Counts(total, total - parts["mtp"] - layers.count(True) * idle_parameters(model), {part: number for part, number in parts.items() if number})


def layer_parameters(model: ModelConfig, *, experts: bool) -> dict[str, int]:
    """Parameters by part of one layer, with experts or with a dense MLP."""
    width, projections, bias = model.hidden_size, 3 if model.gated_linear_unit else 2, int(model.add_bias_linear)
    parts = {"attention": _attention(model), "norms": 2 * _norm(model) + _head_norms(model) + 2 * bias * width}  # and biases added after the sum over tp
    if not experts:
        return parts | {"mlp": (projections * width + bias * (projections - 1)) * model.ffn_hidden_size}
    count = model.num_moe_experts or 0
    shared = projections * width * (model.moe_shared_expert_intermediate_size or 0)
    return parts | {"router": count * width, "experts": count * _expert(model), "shared_experts": shared}


def prediction_parameters(model: ModelConfig) -> dict[str, int]:
    """One prediction module: a layer like the last, the projection of [embedding; hidden], three norms."""
    parts = layer_parameters(model, experts=layers_with_experts(model)[-1])
    return parts | {"norms": parts["norms"] + 3 * _norm(model), "projection": 2 * model.hidden_size**2}


def idle_parameters(model: ModelConfig) -> int:
    """Of a layer with experts: those that a token does not choose."""
    return max(0, (model.num_moe_experts or 0) - model.moe_router_topk) * _expert(model)


def _expert(model: ModelConfig) -> int:
    return (3 if model.gated_linear_unit else 2) * model.hidden_size * (model.moe_ffn_hidden_size or model.ffn_hidden_size)


def _norm(model: ModelConfig) -> int:
    return model.hidden_size * (2 if model.normalization == "LayerNorm" else 1)


def _attention(model: ModelConfig) -> int:
    """Queries, keys, values and output of one layer, with the biases that are cut like their weights."""
    heads, width = model.num_attention_heads, model.hidden_size
    if model.multi_latent_attention:
        key = model.qk_head_dim + model.qk_pos_emb_head_dim
        queries = heads * key
        rank = model.q_lora_rank
        down = width * (model.kv_lora_rank + model.qk_pos_emb_head_dim)
        up = model.kv_lora_rank * heads * (model.qk_head_dim + model.v_head_dim)
        return (rank * (width + queries) if rank else width * queries) + down + up + heads * model.v_head_dim * width
    groups, channels = model.num_query_groups or heads, model.kv_channels or width // heads
    biases = (heads + 2 * groups) * channels if model.add_qkv_bias or model.add_bias_linear else 0
    return width * channels * (2 * heads + 2 * groups) + biases


def _head_norms(model: ModelConfig) -> int:
    """Norms inside attention: over each head, or over the latents."""
    if model.multi_latent_attention:
        return model.kv_lora_rank + (model.q_lora_rank or 0)
    return 2 * (model.kv_channels or model.hidden_size // model.num_attention_heads) if model.qk_layernorm else 0

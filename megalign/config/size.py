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

    `active` counts what one token is computed with: all of `total` except the experts that its router does not
    choose. The embedding and output tables count whole (Mixtral's 12.9B and Qwen3's 3.3B are counted so).
    """

    total: int
    active: int
    by_part: dict[str, int]


def count_parameters(model: ModelConfig, vocab_size: int) -> Counts:
    """Parameters of `model` with `vocab_size` rows in its tables (`padded_vocab` for what a run holds).

    Agrees with the published totals: Llama-3 8.03B and 70.55B, Qwen3-30B-A3B 30.53B, Mixtral-8x7B 46.70B,
    DeepSeek-V3 671.03B. The routers' expert biases are no parameters and are not counted.
    """
    experts = sum(layers_with_experts(model))
    dense, layers = model.num_layers - experts, model.num_layers
    width, projections = model.hidden_size, 3 if model.gated_linear_unit else 2
    table = vocab_size * width
    bias = int(model.add_bias_linear)
    norm = width * (2 if model.normalization == "LayerNorm" else 1)
    expert = projections * width * (model.moe_ffn_hidden_size or model.ffn_hidden_size)
    count = model.num_moe_experts or 0
    parts = {
        "embedding": table,
        "positions": width * model.max_position_embeddings if model.position_embedding_type == "learned_absolute" else 0,
        "attention": layers * _attention(model),
        "mlp": dense * (projections * width + bias * (projections - 1)) * model.ffn_hidden_size,
        "router": experts * count * width,
        "experts": experts * count * expert,
        "shared_experts": experts * projections * width * (model.moe_shared_expert_intermediate_size or 0),
        "norms": layers * (2 * norm + _head_norms(model) + 2 * bias * width) + norm,  # and biases added after the sum over tp
        "output": 0 if model.share_embeddings_and_output_weights else table,
    }
    total = sum(parts.values())
    idle = experts * max(0, count - model.moe_router_topk) * expert
    return Counts(total, total - idle, {part: number for part, number in parts.items() if number})


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

"""Published model shapes by name, and three tiny ones that train on a laptop.

Each preset holds fields of `ModelConfig`; what a recipe gives itself wins over it. This module is data
and imports nothing: `megalign.config.load` reads it before any model code exists.
"""

from __future__ import annotations

from typing import Any

# fmt: off
PRESETS: dict[str, dict[str, Any]] = {
    # Heads, widths and layers that TP 2, PP 2, VPP 2, EP 4 divide; trained in minutes on two CPU cores.
    "tiny-dense": {
        "num_layers": 4, "hidden_size": 128, "ffn_hidden_size": 384, "num_attention_heads": 4, "num_query_groups": 2
    },
    "tiny-moe": {
        "num_layers": 4, "hidden_size": 128, "ffn_hidden_size": 384, "num_attention_heads": 4, "num_query_groups": 2,
        "num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 192, "moe_aux_loss_coeff": 1e-2,
    },
    # DeepSeek-V3 in small: latent attention, a dense layer first, experts in groups with a shared one, balanced by bias.
    "tiny-mla-moe": {
        "num_layers": 4, "hidden_size": 128, "ffn_hidden_size": 384, "num_attention_heads": 4, "layernorm_epsilon": 1e-6,
        "multi_latent_attention": True, "q_lora_rank": 64, "kv_lora_rank": 32, "qk_head_dim": 32, "qk_pos_emb_head_dim": 16,
        "v_head_dim": 32, "num_moe_experts": 8, "moe_layer_freq": [0, 1, 1, 1], "moe_router_topk": 2, "moe_ffn_hidden_size": 96,
        "moe_shared_expert_intermediate_size": 96, "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True,
        "moe_router_num_groups": 4, "moe_router_group_topk": 2, "moe_router_topk_scaling_factor": 2.5,
    },
    # huggingface.co/meta-llama/Meta-Llama-3-8B and -70B, config.json
    "llama3-8b": {
        "num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 14336, "num_attention_heads": 32, "num_query_groups": 8,
        "vocab_size": 128256, "max_position_embeddings": 8192, "rotary_base": 500000.0, "layernorm_epsilon": 1e-5,
    },
    "llama3-70b": {
        "num_layers": 80, "hidden_size": 8192, "ffn_hidden_size": 28672, "num_attention_heads": 64, "num_query_groups": 8,
        "vocab_size": 128256, "max_position_embeddings": 8192, "rotary_base": 500000.0, "layernorm_epsilon": 1e-5,
    },
    # huggingface.co/Qwen/Qwen3-30B-A3B, config.json
    "qwen3-30b-a3b": {
        "num_layers": 48, "hidden_size": 2048, "ffn_hidden_size": 6144, "num_attention_heads": 32, "num_query_groups": 4,
        "kv_channels": 128, "qk_layernorm": True, "vocab_size": 151936, "max_position_embeddings": 40960,
        "rotary_base": 1000000.0, "layernorm_epsilon": 1e-6, "num_moe_experts": 128, "moe_router_topk": 8,
        "moe_ffn_hidden_size": 768, "moe_norm_topk_prob": True,
    },
    # huggingface.co/mistralai/Mixtral-8x7B-v0.1, config.json
    "mixtral-8x7b": {
        "num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 14336, "num_attention_heads": 32, "num_query_groups": 8,
        "vocab_size": 32000, "max_position_embeddings": 32768, "rotary_base": 1000000.0, "layernorm_epsilon": 1e-5,
        "num_moe_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 14336, "moe_norm_topk_prob": True,
    },
    # huggingface.co/deepseek-ai/DeepSeek-V3, config.json; without its prediction module (14B more)
    "deepseek-v3": {
        "num_layers": 61, "hidden_size": 7168, "ffn_hidden_size": 18432, "num_attention_heads": 128, "layernorm_epsilon": 1e-6,
        "vocab_size": 129280, "max_position_embeddings": 163840, "rotary_base": 10000.0, "multi_latent_attention": True,
        "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_head_dim": 128, "qk_pos_emb_head_dim": 64, "v_head_dim": 128,
        "rope_type": "yarn", "rotary_scaling_factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0,
        "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "num_moe_experts": 256, "moe_layer_freq": [0] * 3 + [1] * 58,
        "moe_router_topk": 8, "moe_ffn_hidden_size": 2048, "moe_shared_expert_intermediate_size": 2048,
        "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True, "moe_router_num_groups": 8,
        "moe_router_group_topk": 4, "moe_router_topk_scaling_factor": 2.5,
    },
}
# fmt: on

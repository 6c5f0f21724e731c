"""DeepSeek-V2: multi-latent attention, dense layers first, then experts with a shared one, routed by a softmax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalign.config.layout import layers_with_experts
from megalign.config.schema import ModelConfig
from megalign.models.hf.family import COMMON_FIELDS, Family
from megalign.models.hf.llama import DENSE_MLP, ENDS, LAYER
from megalign.models.hf.qwen3_moe import EXPERTS as ROUTED
from megalign.models.hf.qwen3_moe import QWEN3_MOE
from megalign.models.hf.table import Copy, MergeGateUp, only, under

LATENT_ATTENTION = under(
    *LAYER,
    Copy("input_layernorm.weight", {"input_layernorm.weight": "D"}),
    Copy("self_attention.linear_q_proj.weight", {"self_attn.q_proj.weight": "pD"}),
    Copy("self_attention.linear_q_down_proj.weight", {"self_attn.q_a_proj.weight": "RD"}),
    Copy("self_attention.q_layernorm.weight", {"self_attn.q_a_layernorm.weight": "R"}),
    Copy("self_attention.linear_q_up_proj.weight", {"self_attn.q_b_proj.weight": "PR"}),
    Copy("self_attention.linear_kv_down_proj.weight", {"self_attn.kv_a_proj_with_mqa.weight": "CD"}),
    Copy("self_attention.kv_layernorm.weight", {"self_attn.kv_a_layernorm.weight": "L"}),
    Copy("self_attention.linear_kv_up_proj.weight", {"self_attn.kv_b_proj.weight": "UL"}),
    Copy("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": "DO"}),
    Copy("pre_mlp_layernorm.weight", {"post_attention_layernorm.weight": "D"}),
)
SHARED_EXPERT = under(
    *LAYER,
    MergeGateUp(
        "mlp.shared_experts.linear_fc1.weight",
        {"mlp.shared_experts.gate_proj.weight": "SD", "mlp.shared_experts.up_proj.weight": "SD"},
    ),
    Copy("mlp.shared_experts.linear_fc2.weight", {"mlp.shared_experts.down_proj.weight": "DS"}),
)
FIELDS = {key: field for key, field in COMMON_FIELDS.items() if key not in ("num_key_value_heads", "head_dim")} | {
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_head_dim",
    "qk_rope_head_dim": "qk_pos_emb_head_dim",
    "v_head_dim": "v_head_dim",
    "n_routed_experts": "num_moe_experts",
    "moe_intermediate_size": "moe_ffn_hidden_size",
    "num_experts_per_tok": "moe_router_topk",
    "routed_scaling_factor": "moe_router_topk_scaling_factor",
    "n_group": "moe_router_num_groups",
    "topk_group": "moe_router_group_topk",
}
DEFAULTS: dict[str, Any] = {
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "rope_theta": 10000.0,
    "q_lora_rank": None,
    "routed_scaling_factor": 1.0,
    "n_group": None,
    "topk_group": None,
}
LATENT_EPSILON = 1e-6  # of the norms on the latents, in transformers and DeepSeek's own code whatever rms_norm_eps says


class DeepSeek(Family):
    """What both generations share: leading dense layers, the shared expert in units of experts, the norms' epsilon."""

    def model_config_from_hf(self, config: Mapping[str, Any]) -> dict[str, Any]:
        fields = super().model_config_from_hf(config)
        if fields["layernorm_epsilon"] != LATENT_EPSILON:
            raise self._unsupported("rms_norm_eps", fields["layernorm_epsilon"], f"only {LATENT_EPSILON:g}, that of the latents' norms, is supported")
        dense, layers = config.get("first_k_dense_replace") or 0, fields["num_layers"]
        fields["moe_layer_freq"] = [0] * dense + [1] * (layers - dense) if dense else 1
        fields["moe_shared_expert_intermediate_size"] = (config.get("n_shared_experts") or 0) * fields["moe_ffn_hidden_size"] or None
        return fields | {"num_query_groups": None, "kv_channels": None}

    def hf_config_from_model(self, model: ModelConfig, vocab_size: int, dtype: str, **tokens: Any) -> dict[str, Any]:
        width = model.moe_ffn_hidden_size or model.ffn_hidden_size
        return super().hf_config_from_model(model, vocab_size, dtype, **tokens) | {
            "num_key_value_heads": model.num_attention_heads,
            "first_k_dense_replace": layers_with_experts(model).count(False),
            "n_shared_experts": (model.moe_shared_expert_intermediate_size or 0) // width,
            "routed_scaling_factor": model.moe_router_topk_scaling_factor or 1.0,
        }

    def problems(self, model: ModelConfig) -> list[str]:
        wrong = super().problems(model)
        if model.layernorm_epsilon != LATENT_EPSILON:
            wrong.append(f"model.layernorm_epsilon is {model.layernorm_epsilon:g}, and the format's norms on the latents have {LATENT_EPSILON:g}")
        return wrong

    def problems_of_dense_layers(self, model: ModelConfig) -> list[str]:
        pattern = layers_with_experts(model)
        if pattern == sorted(pattern):
            return []
        return [f"model.moe_layer_freq is {model.moe_layer_freq}, and only the first layers may be dense in the format"]

    def problems_of_shared_expert(self, model: ModelConfig) -> list[str]:
        shared, width = model.moe_shared_expert_intermediate_size or 0, model.moe_ffn_hidden_size or model.ffn_hidden_size
        if shared % width == 0:
            return []
        return [f"model.moe_shared_expert_intermediate_size is {shared}, no multiple of an expert's width {width}"]


class _DeepSeekV2(DeepSeek):
    """Groups are used only where `topk_method` says so: DeepSeek-V2 does, V2-Lite does not."""

    def model_config_from_hf(self, config: Mapping[str, Any]) -> dict[str, Any]:
        method = config.get("topk_method", "greedy")
        if method not in ("greedy", "group_limited_greedy"):
            raise self._unsupported("topk_method", method, "only 'greedy' and 'group_limited_greedy' are supported")
        fields = super().model_config_from_hf(config) | {"moe_norm_topk_prob": False}
        if method == "greedy":
            fields |= {"moe_router_num_groups": None, "moe_router_group_topk": None}
        return fields

    def hf_config_from_model(self, model: ModelConfig, vocab_size: int, dtype: str, **tokens: Any) -> dict[str, Any]:
        method = "group_limited_greedy" if model.moe_router_num_groups else "greedy"
        return super().hf_config_from_model(model, vocab_size, dtype, **tokens) | {"topk_method": method}

    def problems(self, model: ModelConfig) -> list[str]:
        wrong = super().problems(model)
        if model.moe_norm_topk_prob:
            wrong.append("model.moe_norm_topk_prob is True, and the format never rescales the chosen probabilities")
        return wrong


DEEPSEEK_V2 = _DeepSeekV2(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    rows=ENDS + LATENT_ATTENTION + only("dense", DENSE_MLP) + only("experts", ROUTED + SHARED_EXPERT),
    traits={"multi_latent_attention": True},
    fixed={
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "moe_layer_freq": 1,
    },
    fields=FIELDS,
    defaults=DEFAULTS,
    moe=True,
    fused=QWEN3_MOE.fused,
)

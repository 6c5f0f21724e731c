"""Qwen3, dense: Llama with an RMSNorm over each query and key head."""

from __future__ import annotations

from megalign.models.hf.family import COMMON_DEFAULTS, COMMON_FIELDS, Family
from megalign.models.hf.llama import ATTENTION, DENSE_MLP, ENDS, LAYER
from megalign.models.hf.table import Copy, under

QK_NORM = under(
    *LAYER,
    Copy("self_attention.q_layernorm.weight", {"self_attn.q_norm.weight": "d"}),
    Copy("self_attention.k_layernorm.weight", {"self_attn.k_norm.weight": "d"}),
)

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    rows=ENDS + ATTENTION + QK_NORM + DENSE_MLP,
    traits={"qk_layernorm": True},
    fixed={"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
    fields=COMMON_FIELDS,
    defaults=COMMON_DEFAULTS | {"head_dim": 128},
)

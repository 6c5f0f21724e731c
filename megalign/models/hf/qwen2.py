"""Qwen2 and Qwen2.5: Llama with biases in the query, key and value projections."""

from __future__ import annotations

from megalign.models.hf.family import COMMON_DEFAULTS, COMMON_FIELDS, Family
from megalign.models.hf.llama import ATTENTION, DENSE_MLP, ENDS, LAYER
from megalign.models.hf.table import MergeQKV, under

QKV_BIAS = under(
    *LAYER,
    MergeQKV(
        "self_attention.linear_qkv.bias",
        {"self_attn.q_proj.bias": "Q", "self_attn.k_proj.bias": "K", "self_attn.v_proj.bias": "K"},
    ),
)

QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    rows=ENDS + ATTENTION + QKV_BIAS + DENSE_MLP,
    traits={"add_qkv_bias": True},
    fixed={"hidden_act": "silu", "use_sliding_window": False},
    fields=COMMON_FIELDS,
    defaults=COMMON_DEFAULTS | {"rope_theta": 10000.0},
)

"""Llama, 1 to 3.3."""

from __future__ import annotations

from megalign.models.hf.family import COMMON_DEFAULTS, COMMON_FIELDS, Family
from megalign.models.hf.table import EMBEDDING, OUTPUT, Copy, MergeGateUp, MergeQKV, PadVocab, Row, under

LAYER = ("decoder.layers.{layer}.", "model.layers.{layer}.")

ENDS: tuple[Row, ...] = (
    PadVocab(EMBEDDING, {"model.embed_tokens.weight": "VD"}),
    Copy("decoder.final_layernorm.weight", {"model.norm.weight": "D"}),
    PadVocab(OUTPUT, {"lm_head.weight": "VD"}),
)
ATTENTION = under(
    *LAYER,
    Copy("input_layernorm.weight", {"input_layernorm.weight": "D"}),
    MergeQKV(
        "self_attention.linear_qkv.weight",
        {"self_attn.q_proj.weight": "QD", "self_attn.k_proj.weight": "KD", "self_attn.v_proj.weight": "KD"},
    ),
    Copy("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": "DQ"}),
    Copy("pre_mlp_layernorm.weight", {"post_attention_layernorm.weight": "D"}),
)
DENSE_MLP = under(
    *LAYER,
    MergeGateUp("mlp.linear_fc1.weight", {"mlp.gate_proj.weight": "FD", "mlp.up_proj.weight": "FD"}),
    Copy("mlp.linear_fc2.weight", {"mlp.down_proj.weight": "DF"}),
)

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    rows=ENDS + ATTENTION + DENSE_MLP,
    fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    fields=COMMON_FIELDS,
    defaults=COMMON_DEFAULTS | {"rope_theta": 10000.0},
)

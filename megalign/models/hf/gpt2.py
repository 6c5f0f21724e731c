"""GPT-2: learned positions, LayerNorm, GELU, a bias everywhere, weights stored [in, out]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalign.config.schema import ModelConfig
from megalign.models.hf.family import Family
from megalign.models.hf.table import EMBEDDING, OUTPUT, Copy, PadVocab, Row, Transposed, TransposedQKV, under

ENDS: tuple[Row, ...] = (
    PadVocab(EMBEDDING, {"transformer.wte.weight": "VD"}),
    Copy("embedding.position_embeddings.weight", {"transformer.wpe.weight": "ND"}),
    Copy("decoder.final_layernorm.weight", {"transformer.ln_f.weight": "D"}),
    Copy("decoder.final_layernorm.bias", {"transformer.ln_f.bias": "D"}),
    PadVocab(OUTPUT, {"lm_head.weight": "VD"}),
)
LAYER = under(
    "decoder.layers.{layer}.",
    "transformer.h.{layer}.",
    Copy("input_layernorm.weight", {"ln_1.weight": "D"}),
    Copy("input_layernorm.bias", {"ln_1.bias": "D"}),
    TransposedQKV("self_attention.linear_qkv.weight", {"attn.c_attn.weight": "DT"}),
    TransposedQKV("self_attention.linear_qkv.bias", {"attn.c_attn.bias": "T"}),
    Transposed("self_attention.linear_proj.weight", {"attn.c_proj.weight": "QD"}),
    Copy("self_attention.linear_proj.bias", {"attn.c_proj.bias": "D"}),
    Copy("pre_mlp_layernorm.weight", {"ln_2.weight": "D"}),
    Copy("pre_mlp_layernorm.bias", {"ln_2.bias": "D"}),
    Transposed("mlp.linear_fc1.weight", {"mlp.c_fc.weight": "DF"}),
    Copy("mlp.linear_fc1.bias", {"mlp.c_fc.bias": "F"}),
    Transposed("mlp.linear_fc2.weight", {"mlp.c_proj.weight": "FD"}),
    Copy("mlp.linear_fc2.bias", {"mlp.c_proj.bias": "D"}),
)


class _GPT2(Family):
    """No rotary positions, no groups; the width of the MLP may be left to be four times the model's."""

    def model_config_from_hf(self, config: Mapping[str, Any]) -> dict[str, Any]:
        fields = super().model_config_from_hf(config)
        return fields | {"ffn_hidden_size": fields["ffn_hidden_size"] or 4 * fields["hidden_size"], "num_query_groups": None}

    def hf_config_from_model(self, model: ModelConfig, vocab_size: int, dtype: str, **tokens: Any) -> dict[str, Any]:
        dropout = {"attn_pdrop": model.attention_dropout, "resid_pdrop": model.hidden_dropout, "embd_pdrop": model.hidden_dropout}
        return super().hf_config_from_model(model, vocab_size, dtype, **tokens) | dropout

    def problems(self, model: ModelConfig) -> list[str]:
        wrong = super().problems(model)
        heads = model.num_attention_heads
        if (model.num_query_groups or heads) != heads:
            wrong.append(f"model.num_query_groups is {model.num_query_groups}, and each of the {heads} heads has its own keys")
        if (model.kv_channels or model.hidden_size // heads) * heads != model.hidden_size:
            wrong.append(f"model.kv_channels is {model.kv_channels}, and it needs to be hidden_size / num_attention_heads")
        return wrong

    def rope_fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    def rope_keys(self, model: ModelConfig) -> dict[str, Any]:
        return {}


GPT2 = _GPT2(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    rows=ENDS + LAYER,
    traits={
        "normalization": "LayerNorm",
        "activation_func": "gelu_tanh",
        "gated_linear_unit": False,
        "add_bias_linear": True,
        "position_embedding_type": "learned_absolute",
    },
    fixed={
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
    },
    fields={
        "vocab_size": "vocab_size",
        "n_layer": "num_layers",
        "n_embd": "hidden_size",
        "n_inner": "ffn_hidden_size",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
        "layer_norm_epsilon": "layernorm_epsilon",
        "tie_word_embeddings": "share_embeddings_and_output_weights",
        "initializer_range": "init_method_std",
    },
    defaults={"n_inner": None, "tie_word_embeddings": True, "initializer_range": 0.02, "layer_norm_epsilon": 1e-5},
    prefix="transformer.",
)

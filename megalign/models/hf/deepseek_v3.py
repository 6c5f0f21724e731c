"""DeepSeek-V3 and R1: V2's layers, routed by sigmoid scores and a bias that balances the load without a loss."""

from __future__ import annotations

from typing import Any

from megalign.config.schema import ModelConfig
from megalign.models.hf.deepseek_v2 import DEFAULTS, FIELDS, LATENT_ATTENTION, ROUTED, SHARED_EXPERT, DeepSeek
from megalign.models.hf.llama import DENSE_MLP, ENDS, LAYER
from megalign.models.hf.qwen3_moe import QWEN3_MOE
from megalign.models.hf.table import EMBEDDING, OUTPUT, Copy, ahead, only, under

EXPERT_BIAS = under(*LAYER, Copy("mlp.router.expert_bias", {"mlp.gate.e_score_correction_bias": "E"}))

EXPERT_LAYER = ROUTED + EXPERT_BIAS + SHARED_EXPERT
PREDICTION = under(
    "mtp.layers.{depth}.",
    "model.layers.{layer}.",
    Copy("enorm.weight", {"enorm.weight": "D"}),
    Copy("hnorm.weight", {"hnorm.weight": "D"}),
    Copy("eh_proj.weight", {"eh_proj.weight": "DM"}),
    Copy("final_layernorm.weight", {"shared_head.norm.weight": "D"}),
)


class _DeepSeekV3(DeepSeek):
    """Prediction modules follow the last layer, and are loaded where the recipe asks for them by model.mtp_num_layers.

    The config.json alone does not: transformers leaves them out of what it saves, and keeps the number.
    """

    def hf_config_from_model(self, model: ModelConfig, vocab_size: int, dtype: str, **tokens: Any) -> dict[str, Any]:
        return super().hf_config_from_model(model, vocab_size, dtype, **tokens) | {"num_nextn_predict_layers": model.mtp_num_layers or 0}


DEEPSEEK_V3 = _DeepSeekV3(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    rows=ENDS + LATENT_ATTENTION + only("dense", DENSE_MLP) + only("experts", EXPERT_LAYER) + ahead(LATENT_ATTENTION + EXPERT_LAYER + PREDICTION),
    traits={
        "multi_latent_attention": True,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
    },
    fixed={
        "hidden_act": "silu",
        "attention_bias": False,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "rope_interleave": True,
        "moe_layer_freq": 1,
    },
    fields=FIELDS,
    defaults=DEFAULTS,
    moe=True,
    mtp_copies={"model.layers.{layer}.embed_tokens.weight": EMBEDDING, "model.layers.{layer}.shared_head.head.weight": OUTPUT},
    fused=QWEN3_MOE.fused,
)

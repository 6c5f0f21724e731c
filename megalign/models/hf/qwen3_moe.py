"""Qwen3-MoE: Qwen3's attention, every layer a mixture of experts without a shared one."""

from __future__ import annotations

from megalign.models.hf.family import COMMON_DEFAULTS, COMMON_FIELDS, Family
from megalign.models.hf.llama import ATTENTION, ENDS, LAYER
from megalign.models.hf.qwen3 import QK_NORM
from megalign.models.hf.table import Copy, MergeGateUp, under

EXPERTS = under(
    *LAYER,
    Copy("mlp.router.weight", {"mlp.gate.weight": "ED"}),
    MergeGateUp(
        "mlp.experts.local_experts.{expert}.linear_fc1.weight",
        {"mlp.experts.{expert}.gate_proj.weight": "ID", "mlp.experts.{expert}.up_proj.weight": "ID"},
    ),
    Copy("mlp.experts.local_experts.{expert}.linear_fc2.weight", {"mlp.experts.{expert}.down_proj.weight": "DI"}),
)

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    rows=ENDS + ATTENTION + QK_NORM + EXPERTS,
    traits={"qk_layernorm": True},
    fixed={
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    },
    fields=COMMON_FIELDS
    | {
        "num_local_experts": "num_moe_experts",
        "moe_intermediate_size": "moe_ffn_hidden_size",
        "num_experts_per_tok": "moe_router_topk",
        "norm_topk_prob": "moe_norm_topk_prob",
    },
    defaults=COMMON_DEFAULTS,
    moe=True,
    fused={
        "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight": ("model.layers.{layer}.mlp.experts.gate_up_proj", "gate"),
        "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight": ("model.layers.{layer}.mlp.experts.gate_up_proj", "up"),
        "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight": ("model.layers.{layer}.mlp.experts.down_proj", "expert"),
    },
)

"""Mixtral: Llama's attention, every layer a mixture of experts, the chosen probabilities always rescaled."""

from __future__ import annotations

from megalign.models.hf.family import COMMON_DEFAULTS, COMMON_FIELDS, Family
from megalign.models.hf.llama import ATTENTION, ENDS, LAYER
from megalign.models.hf.table import Copy, MergeGateUp, under

EXPERTS = under(
    *LAYER,
    Copy("mlp.router.weight", {"block_sparse_moe.gate.weight": "ED"}),
    MergeGateUp(  # w1 gate, w3 up, w2 down
        "mlp.experts.local_experts.{expert}.linear_fc1.weight",
        {"block_sparse_moe.experts.{expert}.w1.weight": "ID", "block_sparse_moe.experts.{expert}.w3.weight": "ID"},
    ),
    Copy("mlp.experts.local_experts.{expert}.linear_fc2.weight", {"block_sparse_moe.experts.{expert}.w2.weight": "DI"}),
)

MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    rows=ENDS + ATTENTION + EXPERTS,
    fixed={"hidden_act": "silu", "sliding_window": None},
    fields=COMMON_FIELDS
    | {
        "intermediate_size": "moe_ffn_hidden_size",
        "num_local_experts": "num_moe_experts",
        "num_experts_per_tok": "moe_router_topk",
    },
    defaults=COMMON_DEFAULTS,
    moe=True,
    fused={
        "model.layers.{layer}.block_sparse_moe.gate.weight": ("model.layers.{layer}.mlp.gate.weight", "whole"),
        "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight": ("model.layers.{layer}.mlp.experts.gate_up_proj", "gate"),
        "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight": ("model.layers.{layer}.mlp.experts.gate_up_proj", "up"),
        "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight": ("model.layers.{layer}.mlp.experts.down_proj", "expert"),
    },
)

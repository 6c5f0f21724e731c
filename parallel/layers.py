"""Our layer spec: the parts of megatron-core's GPT that run on CPU and on CUDA without Transformer Engine."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megalign.parallel.attention import SdpaCoreAttention


class RMSNorm(torch.nn.RMSNorm):
    """x / rms(x) * weight (Zhang & Sennrich 2019, eq. 4), usable under sequence parallelism.

    Under sequence parallelism each tensor-parallel rank sees only its part of the sequence, so the weight's
    gradient is a partial sum; the attribute `sequence_parallel` has megatron add it over the group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def block_spec(config: TransformerConfig, implementation: str, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage and the norm that ends the block."""
    if implementation == "transformer_engine":
        if importlib.util.find_spec("transformer_engine") is None:
            raise RuntimeError("model.transformer_impl is transformer_engine, but it is not installed; use local")
        layer = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts, moe_grouped_gemm=True, qk_layernorm=config.qk_layernorm
        )
        from megatron.core.extensions.transformer_engine import TENorm

        norm: Any = TENorm
    else:
        layer, norm = local_layer_spec(config), RMSNorm
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=norm)


def local_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """norm, attention, add; norm, MLP or experts, add."""
    qk_norm = RMSNorm if config.qk_layernorm else IdentityOp
    add: Any = get_bias_dropout_add
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=SdpaCoreAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp_spec(config),
            mlp_bda=add,
        ),
    )


def mlp_spec(config: TransformerConfig) -> ModuleSpec:
    """A dense SwiGLU, or a router with experts and, if configured, the shared expert."""
    linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    if config.num_moe_experts is None:
        return ModuleSpec(module=MLP, submodules=linear)
    experts = ModuleSpec(module=SequentialMLP, submodules=linear)
    shared = ModuleSpec(module=SharedExpertMLP, submodules=linear)
    return ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=experts, shared_experts=shared))

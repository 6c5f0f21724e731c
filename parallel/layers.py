"""Our layer spec: the parts of megatron-core's GPT that run on CPU and on CUDA without Transformer Engine."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megalign.kernels.elementwise import rms_norm, swiglu
from megalign.parallel.attention import SdpaCoreAttention
from megalign.parallel.experts import experts_spec


class RMSNorm(torch.nn.RMSNorm):
    """x / rms(x) * weight (Zhang & Sennrich 2019, eq. 4), usable under sequence parallelism.

    Under sequence parallelism each tensor-parallel rank sees only its part of the sequence, so the weight's
    gradient is a partial sum; the attribute `sequence_parallel` has megatron add it over the group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda:  # one kernel there, six operations on a CPU
            return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
        return rms_norm(x, self.weight, self.eps)  # pyright: ignore[reportArgumentType]  it is given, never None


class LayerNorm(torch.nn.LayerNorm):
    """(x - mean) / std * weight + bias (Ba et al. 2016, arXiv:1607.06450), usable under sequence parallelism like `RMSNorm`."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in (self.weight, self.bias):
            parameter.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class SwiGLU:
    """The activation of a gated MLP. megatron builds it where `config.use_te_activation_func` is set, whoever wrote it."""

    def __init__(self, config: TransformerConfig):
        pass

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        return swiglu(gate_up)


def norm_of(config: TransformerConfig) -> type[RMSNorm] | type[LayerNorm]:
    """The class that `config.normalization` names."""
    return {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}[config.normalization]


def block_spec(config: TransformerConfig, implementation: str, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage and the norm that ends the block."""
    if implementation == "transformer_engine":
        if importlib.util.find_spec("transformer_engine") is None:
            raise RuntimeError("model.transformer_impl is transformer_engine, but it is not installed; use local")
        layer = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts, moe_grouped_gemm=True, qk_layernorm=config.qk_layernorm
        )
        from megatron.core.extensions.transformer_engine import TENorm

        layers = [layer] * config.num_layers
        norm: Any = TENorm
    else:
        dense, experts = (local_layer_spec(config, experts=experts) for experts in (False, True))
        layers = [experts if is_moe else dense for is_moe in has_experts(config)]
        norm = norm_of(config)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=layers[first : first + count], layer_norm=norm)


def has_experts(config: TransformerConfig) -> list[bool]:
    """For each layer of the model, whether it is a mixture of experts."""
    if config.num_moe_experts is None:
        return [False] * config.num_layers
    assert isinstance(config.moe_layer_freq, list)
    return [bool(experts) for experts in config.moe_layer_freq]


def local_layer_spec(config: TransformerConfig, *, experts: bool) -> ModuleSpec:
    """norm, attention, add; norm, MLP or experts, add."""
    norm, add = norm_of(config), get_bias_dropout_add
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=latent_attention_spec() if config.multi_latent_attention else attention_spec(config),
            self_attn_bda=add,  # pyright: ignore[reportArgumentType]
            pre_mlp_layernorm=norm,
            mlp=mlp_spec(config, experts=experts),
            mlp_bda=add,  # pyright: ignore[reportArgumentType]
        ),
    )


def attention_spec(config: TransformerConfig) -> ModuleSpec:
    """Multi-head attention, with groups and per-head norms as configured."""
    qk_norm = norm_of(config) if config.qk_layernorm else IdentityOp
    return ModuleSpec(
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

def latent_attention_spec() -> ModuleSpec:
    """Multi-latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    The two down projections are whole on every tensor rank. Under sequence parallelism each rank works on its part of the
    sequence, and their gradients are summed; without it, see `sum_rotary_key_gradients`. Upstream's local spec cuts them by columns; the gradient
    of the rotary key, of which every head has a part, is then off (its gather has a split as backward).
    """
    return ModuleSpec(
        module=MLASelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=ColumnParallelLinear,
            linear_q_down_proj=Linear,
            linear_q_up_proj=ColumnParallelLinear,
            linear_kv_down_proj=Linear,
            linear_kv_up_proj=ColumnParallelLinear,
            core_attention=SdpaCoreAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=RMSNorm,
            kv_layernorm=RMSNorm,
        ),
    )


def sum_rotary_key_gradients(model: torch.nn.Module, config: TransformerConfig, group: Any) -> None:
    """Multi-latent attention without sequence parallelism: add up the rotary key's gradient over tensor ranks, in backward.

    All heads share that key, and each rank has some of the heads. The latent beside it goes through a column-parallel
    layer, whose backward does the same; under sequence parallelism the gather of the key does.
    """
    if group.size() == 1 or config.sequence_parallel or not config.multi_latent_attention:
        return

    def hook(module: Any, inputs: Any, output: Any) -> Any:
        latent, key = output[0].split([config.kv_lora_rank, config.qk_pos_emb_head_dim], dim=-1)  # pyright: ignore[reportAttributeAccessIssue]
        return torch.cat([latent, copy_to_tensor_model_parallel_region(key, group=group)], dim=-1), *output[1:]

    for module in model.modules():
        if isinstance(module, MLASelfAttention):
            module.linear_kv_down_proj.register_forward_hook(hook)


def mlp_spec(config: TransformerConfig, *, experts: bool) -> ModuleSpec:
    """A dense MLP, or a router with experts and, if configured, the shared expert."""
    linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear, activation_func=SwiGLU)
    if not experts:
        return ModuleSpec(module=MLP, submodules=linear)
    routed = experts_spec(config.moe_grouped_gemm, linear)
    shared = ModuleSpec(module=SharedExpertMLP, submodules=linear)
    return ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=routed, shared_experts=shared))

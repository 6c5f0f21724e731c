"""From a recipe's model and layout to megatron-core modules."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megalign.config.layout import layers_with_experts, padded_vocab
from megalign.config.schema import ModelConfig, Recipe
from megalign.models.gpt import DialogueModel
from megalign.models.heads import HeadShape, RewardModel
from megalign.parallel.experts import use_grouped
from megalign.parallel.grid import Grid
from megalign.parallel.init import device
from megalign.parallel.layers import block_spec, sum_rotary_key_gradients
from megalign.parallel.prediction import prediction_spec

ACTIVATIONS: dict[str, Any] = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh")}


def run_options(recipe: Recipe) -> dict[str, Any]:
    """The fields of TransformerConfig that belong to a run and not to the model: uneven stages, recomputation."""
    parallel, train = recipe.parallel, recipe.train
    return dict(
        num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage,
        pipeline_model_parallel_layout=parallel.pipeline_model_parallel_layout,
        recompute_granularity=train.recompute_granularity,
        recompute_method=train.recompute_method,
        recompute_num_layers=train.recompute_num_layers,
        recompute_modules=None if train.recompute_modules is None else list(train.recompute_modules),
    )


def transformer_config(
    model: ModelConfig, grid: Grid, *, sequence_parallel: bool = False, bf16: bool = False, options: Mapping[str, Any] | None = None
) -> TransformerConfig:
    """Megatron's configuration of `model` on `grid`. options: of the run (`run_options`)."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    interleaved = grid.virtual_pipeline is not None
    kind, latent = (MLATransformerConfig, _latent_attention(model)) if model.multi_latent_attention else (TransformerConfig, {})
    config = kind(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups or model.num_attention_heads,
        kv_channels=model.kv_channels or model.hidden_size // model.num_attention_heads,
        normalization=model.normalization,
        layernorm_epsilon=model.layernorm_epsilon,
        qk_layernorm=model.qk_layernorm,
        gated_linear_unit=model.gated_linear_unit,
        activation_func=ACTIVATIONS[model.activation_func],
        # That of our layer spec (`megalign.parallel.layers.SwiGLU`), which needs no Transformer Engine.
        use_te_activation_func=model.gated_linear_unit and model.activation_func == "silu" and model.transformer_impl == "local",
        add_bias_linear=model.add_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        init_method_std=model.init_method_std,
        attention_dropout=model.attention_dropout,
        hidden_dropout=model.hidden_dropout,
        mtp_num_layers=model.mtp_num_layers,
        mtp_loss_scaling_factor=model.mtp_loss_scaling_factor,
        tensor_model_parallel_size=grid.tensor.size,
        pipeline_model_parallel_size=grid.pipeline.size,
        virtual_pipeline_model_parallel_size=grid.virtual_pipeline,
        context_parallel_size=grid.context.size,
        expert_model_parallel_size=grid.expert.size,
        sequence_parallel=sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=bf16,
        use_cpu_initialization=not torch.cuda.is_available(),
        # megalign.models.init gives the weights, alike on every layout. perform_initialization=False would
        # also skip the attribute `tensor_model_parallel`, and the gradient norm would then be wrong.
        init_method=_leave,
        output_layer_init_method=_leave,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        # gloo, interleaved: the defaults give gradients off by 0.1 (batched) or a race (overlap, deallocation).
        batch_p2p_comm=not interleaved,
        overlap_p2p_comm=False,
        deallocate_pipeline_outputs=not interleaved,
        **latent,
        **(options or {}),
        **_experts(model, grid),
    )
    if model.num_moe_experts is not None and model.transformer_impl == "local":
        width = (model.moe_ffn_hidden_size or model.ffn_hidden_size) // grid.expert_tensor.size
        config.moe_grouped_gemm = use_grouped(model.moe_grouped_gemm, device().type, dtype, model.hidden_size, width)
    if model.rope_type == "yarn" and not model.multi_latent_attention:
        for name, value in _yarn(model).items():  # read by gpt_model.py:179 and attention.py:1102, and no field of the class
            setattr(config, f"yarn_{name}", value)
    return config


def _experts(model: ModelConfig, grid: Grid) -> dict[str, Any]:
    if model.num_moe_experts is None:
        return {}
    return dict(
        num_moe_experts=model.num_moe_experts,
        moe_ffn_hidden_size=model.moe_ffn_hidden_size or model.ffn_hidden_size,
        moe_layer_freq=[int(experts) for experts in layers_with_experts(model)],
        moe_router_topk=model.moe_router_topk,
        moe_router_score_function=model.moe_router_score_function,
        # softmax over all experts, then the top k, divided by their sum; without normalisation the plain
        # probabilities. A softmax over the chosen k equals the normalised form: megatron's post-softmax.
        moe_router_pre_softmax=not model.moe_norm_topk_prob,
        moe_router_enable_expert_bias=model.moe_router_enable_expert_bias,
        moe_router_bias_update_rate=model.moe_router_bias_update_rate,
        moe_router_num_groups=model.moe_router_num_groups,
        moe_router_group_topk=model.moe_router_group_topk,
        moe_router_topk_scaling_factor=model.moe_router_topk_scaling_factor,
        moe_shared_expert_intermediate_size=model.moe_shared_expert_intermediate_size,
        moe_router_load_balancing_type="aux_loss" if model.moe_aux_loss_coeff else "none",
        moe_aux_loss_coeff=model.moe_aux_loss_coeff,
        moe_z_loss_coeff=model.moe_z_loss_coeff,
        moe_input_jitter_eps=model.moe_input_jitter_eps,
        moe_token_dispatcher_type=model.moe_token_dispatcher_type,
        moe_expert_capacity_factor=model.moe_expert_capacity_factor,
        moe_router_dtype="fp32",
        moe_grouped_gemm=False,  # said below: here it would ask for Transformer Engine (transformer_config.py:1607)
        expert_tensor_parallel_size=grid.expert_tensor.size,
    )


def _latent_attention(model: ModelConfig) -> dict[str, Any]:
    scaling: dict[str, Any] = {"rotary_scaling_factor": 1.0}
    if model.rope_type == "yarn":
        scaling = _yarn(model)
        del scaling["correction_range_round_to_int"]
    return dict(
        q_lora_rank=model.q_lora_rank,
        kv_lora_rank=model.kv_lora_rank,
        qk_head_dim=model.qk_head_dim,
        qk_pos_emb_head_dim=model.qk_pos_emb_head_dim,
        v_head_dim=model.v_head_dim,
        rope_type=model.rope_type,
        rotary_base=model.rotary_base,
        **scaling,
    )


def _yarn(model: ModelConfig) -> dict[str, Any]:
    return dict(
        rotary_scaling_factor=model.rotary_scaling_factor,
        original_max_position_embeddings=model.original_max_position_embeddings,
        beta_fast=model.beta_fast,
        beta_slow=model.beta_slow,
        mscale=model.mscale,
        mscale_all_dim=model.mscale_all_dim,
        correction_range_round_to_int=True,
    )


def _leave(weight: torch.Tensor) -> None:
    """An initialiser that does nothing."""


def build_chunks(
    model: ModelConfig,
    grid: Grid,
    vocab_size: int,
    *,
    sequence_parallel: bool = False,
    bf16: bool = False,
    options: Mapping[str, Any] | None = None,
    heads: Mapping[str, HeadShape] | None = None,
) -> list[DialogueModel]:
    """The parts of the model that this rank holds: one, or one a virtual stage. Weights are uninitialised.

    vocab_size: rows the tokenizer needs; the tables are padded to `padded_vocab`. options: see `run_options`.
    heads: of a reward model; None: a model that speaks.
    """
    config = transformer_config(model, grid, sequence_parallel=sequence_parallel, bf16=bf16, options=options)
    stages, latent = grid.virtual_pipeline or 1, model.multi_latent_attention
    chunks = []
    for stage in range(stages):
        vp_stage = stage if grid.virtual_pipeline else None
        is_last = grid.is_last_stage and stage == stages - 1
        kind = functools.partial(RewardModel, shapes=heads) if heads else DialogueModel
        chunk = kind(
            config,
            block_spec(config, model.transformer_impl, vp_stage),
            vocab_size=padded_vocab(vocab_size, grid.tensor.size),
            real_vocab_size=vocab_size,
            max_sequence_length=model.max_position_embeddings,
            pre_process=grid.is_first_stage and stage == 0,
            post_process=is_last,
            position_embedding_type="yarn" if model.rope_type == "yarn" and not latent else model.position_embedding_type,
            rotary_base=model.rotary_base,  # pyright: ignore[reportArgumentType]
            share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
            mtp_block_spec=prediction_spec(config) if is_last and model.mtp_num_layers else None,
            pg_collection=grid.process_groups,
            vp_stage=vp_stage,
        )
        if model.rope_type == "llama3":
            _scale_frequencies(chunk, model)
        _tag_experts(chunk)
        sum_rotary_key_gradients(chunk, config, grid.tensor.group)
        if config.recompute_granularity is not None and (chunk.pre_process or chunk.mtp_process):
            chunk.embedding.register_forward_hook(_with_gradient)
        chunks.append(chunk if not torch.cuda.is_available() else chunk.cuda())
    return chunks


def _with_gradient(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """Reentrant checkpoints give no gradient to weights when no INPUT needs one: frozen embeddings would freeze the rest."""
    return output if output.requires_grad or not torch.is_grad_enabled() else output.detach().requires_grad_()


def _scale_frequencies(chunk: DialogueModel, model: ModelConfig) -> None:
    """Llama 3.1's scaling with the factors of `model`; GPTModel passes only the first of the four on (gpt_model.py:155)."""
    rope: Any = chunk.rotary_pos_emb
    rope.inv_freq = rope._apply_scaling(
        rope.inv_freq, model.rotary_scaling_factor, model.low_freq_factor, model.high_freq_factor, model.original_max_position_embeddings
    )


def _tag_experts(chunk: DialogueModel) -> None:
    """Say that experts are reduced over their own data-parallel group, and have an optimizer of their own.

    megatron-core 0.16.1 (tensor_parallel/layers.py:886) says so only when expert_model_parallel_size > 1. With
    TP 2, EP 1 and ETP 1 each tensor rank's experts would silently keep the gradient of its own tokens alone; and
    a checkpoint saved with one kind of optimizer could not be loaded into the other.
    """
    for name, parameter in chunk.named_parameters():
        if ".local_experts." in name:
            parameter.allreduce = False  # pyright: ignore[reportAttributeAccessIssue]

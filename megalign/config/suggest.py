"""The key that the user meant: aliases, keys of another section, and spelling.

People come with the names of other trainers in their fingers (`learning_rate`, `tp`, `batch_size`), so
an unknown key is looked up there before its spelling is compared.
"""

from __future__ import annotations

from difflib import SequenceMatcher, get_close_matches
from functools import cache

from pydantic.fields import FieldInfo

from megalign.config.schema import Recipe, Section

CLOSE = 0.6  # difflib ratio from which two names count as one misspelt
SAME_SECTION = 0.1  # what it is worth that a candidate lies in the section where the key was written

_NAMES = {
    "model": "architecture network arch",
    "model.init_from": "pretrained pretrained_model model_path model_name_or_path init checkpoint",
    "model.num_layers": "n_layers n_layer layers num_hidden_layers depth",
    "model.hidden_size": "d_model dim n_embd model_dim embedding_size",
    "model.ffn_hidden_size": "intermediate_size d_ff ffn_size mlp_size",
    "model.num_attention_heads": "n_heads n_head num_heads",
    "model.num_query_groups": "num_key_value_heads n_kv_heads num_kv_heads kv_heads",
    "model.kv_channels": "head_dim head_size",
    "model.rotary_base": "rope_theta rope_base",
    "model.layernorm_epsilon": "rms_norm_eps norm_eps norm_epsilon",
    "model.share_embeddings_and_output_weights": "tie_word_embeddings tie_embeddings tied_embeddings",
    "model.init_method_std": "init_std initializer_range",
    "model.hidden_dropout": "hidden_dropout_prob resid_pdrop resid_dropout",
    "model.num_moe_experts": "num_experts n_experts num_local_experts experts",
    "model.moe_ffn_hidden_size": "moe_intermediate_size expert_hidden_size",
    "model.moe_router_topk": "top_k topk num_experts_per_tok",
    "model.moe_norm_topk_prob": "norm_topk_prob",
    "model.moe_aux_loss_coeff": "router_aux_loss_coef aux_loss_coeff aux_loss",
    "model.moe_expert_capacity_factor": "capacity_factor",
    "model.normalization": "norm norm_type",
    "model.activation_func": "hidden_act activation act_fn activation_function",
    "model.gated_linear_unit": "swiglu glu",
    "model.add_qkv_bias": "qkv_bias attention_bias",
    "model.add_bias_linear": "bias use_bias mlp_bias",
    "model.rope_type": "rope_scaling rope_scaling_type use_rope_scaling",
    "model.rotary_scaling_factor": "rope_scaling_factor yarn_factor rope_factor",
    "model.multi_latent_attention": "mla use_mla",
    "model.qk_head_dim": "qk_nope_head_dim",
    "model.qk_pos_emb_head_dim": "qk_rope_head_dim",
    "model.moe_layer_freq": "first_k_dense_replace decoder_sparse_step moe_layers",
    "model.moe_shared_expert_intermediate_size": "n_shared_experts shared_expert_intermediate_size",
    "model.moe_router_score_function": "scoring_func score_function",
    "model.moe_router_enable_expert_bias": "aux_loss_free expert_bias",
    "model.moe_router_num_groups": "n_group num_expert_group",
    "model.moe_router_group_topk": "topk_group",
    "model.moe_router_topk_scaling_factor": "routed_scaling_factor",
    "parallel": "parallelism distributed mesh layout",
    "parallel.tensor_model_parallel_size": "tp tp_size tensor_parallel tensor_parallel_size",
    "parallel.pipeline_model_parallel_size": "pp pp_size pipeline_parallel pipeline_parallel_size",
    "parallel.virtual_pipeline_model_parallel_size": "vpp vpp_size virtual_pipeline_parallel_size",
    "parallel.num_layers_in_first_pipeline_stage": "decoder_first_pipeline_num_layers",
    "parallel.num_layers_in_last_pipeline_stage": "decoder_last_pipeline_num_layers",
    "parallel.pipeline_model_parallel_layout": "pipeline_layout pp_layout",
    "parallel.context_parallel_size": "cp cp_size context_parallel",
    "parallel.expert_model_parallel_size": "ep ep_size expert_parallel expert_parallel_size",
    "parallel.expert_tensor_parallel_size": "etp etp_size",
    "parallel.sequence_parallel": "sp",
    "parallel.data_parallel_size": "dp dp_size data_parallel",
    "parallel.use_distributed_optimizer": "distributed_optimizer zero zero1 shard_optimizer",
    "data": "dataset datasets",
    "data.train": "train_file train_files train_path train_data",
    "data.validation": "val valid validation_file eval_file val_data eval_dataset",
    "data.sequence_length": "seq_length seq_len max_length max_seq_length max_seq_len block_size context_length",
    "data.template": "chat_template",
    "data.packing": "pack",
    "data.tokenizer": "tokeniser",
    "data.mixture": "mix blend data_blend interleave",
    "data.streaming": "stream iterable",
    "data.shuffle_window": "shuffle_buffer shuffle_buffer_size buffer_size",
    "data.cache_dir": "cache cache_path data_cache_path",
    "data.order_by_length": "group_by_length",
    "data.tokenizer.path": "tokenizer_path tokenizer_name",
    "data.tokenizer.special_tokens": "additional_special_tokens extra_tokens added_tokens",
    "optimizer": "optim optimiser adam",
    "optimizer.lr": "learning_rate max_lr base_lr",
    "optimizer.weight_decay": "wd",
    "optimizer.adam_beta1": "beta1",
    "optimizer.adam_beta2": "beta2",
    "optimizer.adam_eps": "eps epsilon",
    "optimizer.clip_grad": "grad_clip gradient_clipping max_grad_norm clip_grad_norm gradient_clip_val",
    "optimizer.lr_decay_style": "lr_scheduler lr_scheduler_type scheduler lr_schedule schedule",
    "optimizer.lr_warmup_steps": "warmup warmup_steps warmup_iters lr_warmup_iters num_warmup_steps",
    "optimizer.lr_wsd_decay_steps": "lr_wsd_decay_iters num_decay_steps decay_steps wsd_decay_steps",
    "train": "training trainer",
    "train.freeze": "freeze_parameters frozen freeze_layers",
    "lora": "peft adapter adapters",
    "lora.rank": "lora_rank lora_r r",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.target_modules": "lora_target lora_target_modules",
    "train.eval_prompts": "generate_eval eval_generate predict_with_generate",
    "train.micro_batch_size": "mbs micro_batch per_device_train_batch_size per_device_batch_size",
    "train.global_batch_size": "batch_size gbs train_batch_size gradient_accumulation_steps",
    "train.max_steps": "steps train_iters train_steps total_steps iterations num_steps",
    "train.epochs": "num_train_epochs num_epochs max_epochs n_epochs",
    "train.precision": "dtype bf16 fp16 mixed_precision",
    "train.seed": "random_seed",
    "optimizer.optimizer_cpu_offload": "offload_optimizer cpu_offload offload zero_offload",
    "train.recompute_granularity": "gradient_checkpointing activation_checkpointing recompute_activations activation_recomputation",
    "train.eval_interval": "eval_steps eval_every eval_iters evaluation_interval",
    "train.save_interval": "save_steps save_every checkpoint_interval",
    "train.async_save": "async_checkpoint async_checkpointing background_save",
    "train.hang_timeout_seconds": "hang_timeout watchdog watchdog_timeout heartbeat_timeout timeout",
    "train.early_stop_patience": "patience early_stopping_patience",
    "train.early_stop_min_delta": "min_delta early_stopping_threshold",
    "logging": "logger log",
    "logging.log_interval": "logging_steps log_every log_steps",
    "logging.profile_steps": "profile profiler profile_step_start",
    "logging.trackers": "wandb mlflow report_to loggers",
    "logging.timers": "timing timing_log_level wall_clock_breakdown",
    "output": "output_dir out_dir save_dir run_dir",
    "name": "run_name experiment_name",
}
ALIASES = {alias: key for key, names in _NAMES.items() for alias in names.split()}


@cache
def known_keys() -> dict[str, FieldInfo]:
    """Every key of a recipe, dotted, sections included."""

    def walk(section: type[Section], prefix: str):
        for name, field in section.model_fields.items():
            yield prefix + name, field
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                yield from walk(field.annotation, f"{prefix}{name}.")

    return dict(walk(Recipe, ""))


def suggest(unknown: str) -> list[str]:
    """Known dotted keys that `unknown` (dotted) may have meant, best first; empty if none is near."""
    parent, _, leaf = unknown.rpartition(".")
    leaf = leaf.lower().replace("-", "_")
    elsewhere = [key for key in known_keys() if key.rpartition(".")[2] == leaf]
    if elsewhere:
        return elsewhere

    def nearness(name: str, key: str) -> float:
        same_section = SAME_SECTION if key.rpartition(".")[0] == parent else 0.0
        return SequenceMatcher(None, leaf, name).ratio() + same_section

    names = [(key.rpartition(".")[2], key) for key in known_keys()] + list(ALIASES.items())
    score, key = max((nearness(name, key), key) for name, key in names)
    return [key] if score >= CLOSE else []


def closest(word: str, choices: list[str]) -> str:
    """` (did you mean X?)` for a value misspelt, or nothing."""
    near = get_close_matches(word, choices, n=1, cutoff=CLOSE)
    return f" (did you mean {near[0]}?)" if near else ""

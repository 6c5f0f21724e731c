"""Each rule fires alone, with its arithmetic, and lets the neighbouring valid recipe through."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from megalign.config import rules
from megalign.config.errors import ConfigError
from megalign.config.layout import layout_of, sequence_multiple
from megalign.config.rules import check, check_vocabulary, world_size_of
from megalign.config.schema import Recipe
from megalign.config.yaml12 import read_yaml
from megalign.models.presets import PRESETS


def recipe(keys: str = "") -> Recipe:
    """A recipe of `key=value` words; keys are dotted, or one of the short names below. Later words win."""
    data: dict[str, Any] = {}
    for key, _, value in (word.partition("=") for word in keys.split()):
        *path, leaf = SHORT.get(key, key).split(".")
        section = data
        for name in path:
            section = section.setdefault(name, {})
        section[leaf] = read_yaml(value)
    model = data.get("model", {})
    return Recipe.model_validate({**data, "model": {**PRESETS.get(model.get("preset"), {}), **model}})


SHORT = {
    "preset": "model.preset",
    "tp": "parallel.tensor_model_parallel_size",
    "pp": "parallel.pipeline_model_parallel_size",
    "vpp": "parallel.virtual_pipeline_model_parallel_size",
    "cp": "parallel.context_parallel_size",
    "ep": "parallel.expert_model_parallel_size",
    "etp": "parallel.expert_tensor_parallel_size",
    "dp": "parallel.data_parallel_size",
    "sp": "parallel.sequence_parallel",
    "layers": "model.num_layers",
    "hidden": "model.hidden_size",
    "heads": "model.num_attention_heads",
    "groups": "model.num_query_groups",
    "channels": "model.kv_channels",
    "ffn": "model.ffn_hidden_size",
    "experts": "model.num_moe_experts",
    "topk": "model.moe_router_topk",
    "micro": "train.micro_batch_size",
    "batch": "train.global_batch_size",
    "sequence": "data.sequence_length",
    "max_steps": "train.max_steps",
    "first": "parallel.num_layers_in_first_pipeline_stage",
    "last": "parallel.num_layers_in_last_pipeline_stage",
    "stages": "parallel.pipeline_model_parallel_layout",
    "granularity": "train.recompute_granularity",
    "method": "train.recompute_method",
    "recomputed": "train.recompute_num_layers",
    "modules": "train.recompute_modules",
}


def violations(given: Recipe, world: int | None = None) -> dict[str, str]:
    """field -> message."""
    try:
        check(given, world)
    except ConfigError as error:
        return {problem.field: str(problem) for problem in error.problems}
    return {}


@pytest.fixture(autouse=True)
def without_transformer_engine(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


# rule, keys, world, field, words of the message; then the smallest change that makes it valid
CASES = [
    (
        "world", "tp=4 pp=2 dp=2", 8, "parallel.data_parallel_size",
        "tp(4) * pp(2) * cp(1) * dp(2) = 16, but the world has 8 ranks; lower parallel.data_parallel_size to 1", "dp=1",
    ),
    ("world", "tp=2 dp=1", 4, "parallel.data_parallel_size", "= 2, but the world has 4 ranks; raise parallel.data_parallel_size to 2", "dp=2"),
    ("world", "tp=2 cp=2", 6, "parallel", "tp(2) * pp(1) * cp(2) = 4 does not divide the 6 ranks of the world; start a multiple of 4", "cp=1 batch=9"),
    ("pipeline", "pp=2 layers=5", 2, "model.num_layers", "multiple of pp(2), but 5 = 2 * 2 + 1; set it to 4 or 6", "layers=6"),
    ("pipeline", "pp=2 vpp=2 layers=6", 2, "model.num_layers", "pp(2) * vpp(2) = 4, but 6 = 1 * 4 + 2; set it to 4 or 8", "layers=8"),
    ("pipeline", "vpp=2", None, "parallel.virtual_pipeline_model_parallel_size", "=2: interleaving needs a pipeline", "pp=2"),
    ("pipeline", "first=3", None, "parallel.num_layers_in_first_pipeline_stage", "=3: there is one stage, pipeline_model_parallel_size is 1; set it to null", "pp=2"),
    ("pipeline", "pp=2 first=4", 2, "parallel.num_layers_in_first_pipeline_stage", "first(4) of num_layers(4) leave 0 for 1 other stages", "first=3"),
    ("pipeline", "pp=2 first=2 last=1", 2, "parallel.num_layers_in_first_pipeline_stage", "first(2) + last(1) of num_layers(4) leave 1 for 0 other stages", "first=3"),
    ("pipeline", "pp=4 last=2 layers=61", 4, "parallel.num_layers_in_last_pipeline_stage", "last(2) of num_layers(61) leave 59 = 19 * 3 + 2 for 3 stages; set it to 4", "last=4"),
    ("pipeline", "pp=2 vpp=2 first=3 layers=5", 2, "parallel.num_layers_in_first_pipeline_stage", "a stage of 3 layers has no 2 equal virtual stages", "first=2 layers=6"),
    ("pipeline", "pp=2 vpp=2 first=4 layers=5", 2, "model.num_layers", "a stage of 1 layers has no 2 equal virtual stages", "layers=6"),
    ("pipeline", "pp=2 vpp=2 first=2 last=2", 2, "parallel.num_layers_in_last_pipeline_stage", "megatron-core divides by their number (transformer_layer.py:137); set it to null", "last=null"),
    ("pipeline", "pp=2 stages=Ett|ttL first=2", 2, "parallel.num_layers_in_first_pipeline_stage", "pipeline_model_parallel_layout says it too", "first=null"),
    ("pipeline", "pp=2 stages=Ett|txL", 2, "parallel.pipeline_model_parallel_layout", "means nothing in x; write E the embedding", "stages=Ett|ttL"),
    ("pipeline", "pp=2 stages=Et|t|t|tL", 2, "parallel.pipeline_model_parallel_layout", "has 4 stages, and the layout needs pp(2); set parallel.virtual_pipeline_model_parallel_size to 2", "vpp=2"),
    ("pipeline", "pp=2 stages=Ettt|L", 2, "parallel.pipeline_model_parallel_layout", "has 3 t where num_layers(4) must stand; write t 4 times", "layers=3"),
    ("pipeline", "pp=2 stages=tEttt|L", 2, "parallel.pipeline_model_parallel_layout", "must begin with E", "stages=E|(t)*4L"),
    ("pipeline", "pp=2 stages=Et*4m|L", 2, "parallel.pipeline_model_parallel_layout", "has 1 m where mtp_num_layers(0)", "stages=Et*4|L"),
    ("recompute", "method=uniform", 1, "train.recompute_method", "=uniform: is not read: recompute_granularity is null; set it to null, or train.recompute_granularity to full", "granularity=full recomputed=1"),
    ("recompute", "granularity=selective recomputed=1", 1, "train.recompute_num_layers", "is not read: recompute_granularity is selective", "recomputed=null"),
    ("recompute", "granularity=full method=block recomputed=1 modules=[mlp]", 1, "train.recompute_modules", "set it to null, or train.recompute_granularity to selective", "modules=null"),
    ("recompute", "granularity=full recomputed=1", 1, "train.recompute_method", "=null: full recomputation needs it; set it, e.g. to uniform", "method=block"),
    ("recompute", "granularity=full method=block", 1, "train.recompute_num_layers", "set it, e.g. to 1", "recomputed=1"),
    ("recompute", "granularity=full method=block recomputed=3 pp=2", 2, "train.recompute_num_layers", "a stage has at most 2 layers; lower it to 2", "recomputed=2"),
    ("recompute", "granularity=full method=uniform recomputed=2 pp=2 first=3 layers=5", 2, "train.recompute_num_layers", "a stage of 3 layers has no whole groups of 2; choose a divisor", "recomputed=1"),
    ("recompute", "granularity=selective modules=[moe]", 1, "train.recompute_modules", "moe: the model has no experts; name mlp instead", "modules=[mlp]"),
    ("recompute", "granularity=selective modules=[mlp] experts=4", 1, "train.recompute_modules", "every layer has experts", "modules=[moe]"),
    ("recompute", "granularity=selective modules=[shared_experts] experts=4", 1, "train.recompute_modules", "no shared expert", "model.moe_shared_expert_intermediate_size=64"),
    ("recompute", "granularity=selective modules=[moe,shared_experts] experts=4 model.moe_shared_expert_intermediate_size=64", 1, "train.recompute_modules", "third time", "modules=[moe]"),
    ("recompute", "granularity=selective modules=[moe_act] experts=4", 1, "train.recompute_modules", "needs grouped experts", "modules=[moe]"),
    ("recompute", "granularity=selective modules=[mla_up_proj]", 1, "train.recompute_modules", "no latent attention", "modules=[core_attn]"),
    ("recompute", "granularity=selective modules=[]", 1, "train.recompute_modules", "of nothing; name a module", "modules=null"),
    ("prediction", "model.mtp_num_layers=1 model.position_embedding_type=learned_absolute", 1, "model.mtp_num_layers", "come with rotary positions; set it to null", "model.mtp_num_layers=null"),
    ("prediction", "model.mtp_num_layers=1 model.share_embeddings_and_output_weights=true pp=2", 2, "model.mtp_num_layers", "needs one stage, and pipeline_model_parallel_size is 2", "pp=1"),
    ("prediction", "model.mtp_num_layers=1 model.mtp_loss_scaling_factor=0", 1, "model.mtp_loss_scaling_factor", "would only decay; add mtp to train.freeze", "train.freeze=[mtp]"),
    ("interleaving", "pp=2 vpp=2 batch=3", 2, "train.global_batch_size", "=3: gives 3 microbatches, and virtual pipeline stages need a multiple of pp(2); set it to 4", "batch=4"),
    ("interleaving", "pp=4 vpp=2 layers=8 batch=12 micro=2", 8, "train.global_batch_size", "gives 3 microbatches, and virtual pipeline stages need a multiple of pp(4); set it to 16", "batch=16"),
    ("expert_layout", "ep=2", 2, "parallel.expert_model_parallel_size", "=2: the model has no experts; set it to 1", "ep=1"),
    ("expert_layout", "etp=2", 2, "parallel.expert_tensor_parallel_size", "=2: the model has no experts; set it to null", "etp=null"),
    ("expert_layout", "experts=6 ep=4", 4, "model.num_moe_experts", "expert_model_parallel_size(4), but 6 = 1 * 4 + 2; set it to 4 or 8", "experts=8"),
    (
        "expert_layout", "experts=4 ep=4 pp=2", 4, "parallel.expert_model_parallel_size",
        "etp(1) * ep(4) * pp(2) = 8 does not divide the 4 ranks of the world; start a multiple of 8 ranks", "ep=2",
    ),
    ("expert_layout", "experts=4 ep=2 tp=3 sp=true heads=6 hidden=96 sequence=258", 3, "parallel.expert_model_parallel_size", "start a multiple of 6 ranks", "ep=1"),
    ("sequence_parallel", "sp=true", None, "parallel.sequence_parallel", "=true: needs tensor_model_parallel_size > 1, and it is 1; set it to false", "tp=2"),
    ("sequence_parallel", "tp=2 experts=4", 2, "parallel.sequence_parallel", "=false: experts under tensor_model_parallel_size(2) need sequence parallelism; set it to true", "sp=true"),
    (
        "overlap", "parallel.overlap_param_gather=true parallel.use_distributed_optimizer=false", 1,
        "parallel.overlap_param_gather", "needs use_distributed_optimizer", "parallel.use_distributed_optimizer=true",
    ),
    (
        "offload", "optimizer.optimizer_cpu_offload=true parallel.use_distributed_optimizer=false", 1, "optimizer.optimizer_cpu_offload",
        "needs use_distributed_optimizer, which is false", "parallel.use_distributed_optimizer=true",
    ),
    ("heads", "tp=3 heads=4 groups=12 ffn=384", 3, "model.num_attention_heads", "tensor_model_parallel_size(3), but 4 = 1 * 3 + 1; set it to 3 or 6", "heads=12 hidden=120"),
    ("heads", "heads=4 groups=3", 1, "model.num_query_groups", "=3: must divide num_attention_heads(4); choose one of 1, 2, 4", "groups=2"),
    ("heads", "tp=4 heads=12 groups=6 hidden=96", 4, "model.num_query_groups", "=6: must be a multiple or a divisor of tensor_model_parallel_size(4)", "groups=4"),
    ("heads", "heads=3", 1, "model.hidden_size", "num_attention_heads(3), but 128 = 42 * 3 + 2; set it to 126 or 129, or give model.kv_channels", "channels=42"),
    ("heads", "channels=33", 1, "model.kv_channels", "=33: the size of a head is 33, and rotary embeddings need an even one; set it to 34", "channels=34"),
    ("heads", "tp=8 heads=8 groups=1 channels=2", 8, "model.kv_channels", "(8 + 2 * 1) * 2 = 20 wide, no multiple of tensor_model_parallel_size(8)", "channels=4"),
    ("heads", "preset=tiny-mla-moe tp=3 sp=true ffn=384 sequence=258 model.moe_shared_expert_intermediate_size=96", 3, "model.num_attention_heads", "tensor_model_parallel_size(3), but 4 = 1 * 3 + 1", "heads=6"),
    ("heads", "preset=tiny-mla-moe groups=2", 1, "model.num_query_groups", "=2: with multi-latent attention each of the 4 heads has its own keys", "groups=null"),
    ("heads", "preset=tiny-mla-moe channels=32", 1, "model.kv_channels", "has qk_head_dim, qk_pos_emb_head_dim and v_head_dim instead", "channels=null"),
    ("heads", "preset=tiny-mla-moe model.qk_layernorm=true", 1, "model.qk_layernorm", "norms on its latents", "model.qk_layernorm=false"),
    ("heads", "preset=tiny-mla-moe model.add_qkv_bias=true", 1, "model.add_qkv_bias", "no biases", "model.add_qkv_bias=false"),
    ("heads", "preset=tiny-mla-moe model.qk_pos_emb_head_dim=15", 1, "model.qk_pos_emb_head_dim", "pairs of channels; set it to 16", "model.qk_pos_emb_head_dim=16"),
    ("heads", "preset=tiny-mla-moe model.normalization=LayerNorm", 1, "model.normalization", "comes with RMSNorm", "model.normalization=RMSNorm"),
    ("positions", "model.rope_type=yarn", 1, "model.original_max_position_embeddings", "=null: rope_type yarn scales from it", "model.original_max_position_embeddings=64"),
    ("positions", "model.rotary_scaling_factor=4.0", 1, "model.rotary_scaling_factor", "rope_type rope does not scale", "model.rotary_scaling_factor=1.0"),
    ("positions", "model.position_embedding_type=learned_absolute model.rope_type=yarn", 1, "model.rope_type", "has no frequencies; set it to rope", "model.rope_type=rope"),
    ("positions", "model.position_embedding_type=learned_absolute model.max_position_embeddings=128", 1, "data.sequence_length", "has max_position_embeddings(128) rows; lower it to 128", "sequence=128"),
    ("positions", "preset=tiny-mla-moe model.rope_type=llama3 model.original_max_position_embeddings=64", 1, "model.rope_type", "multi-latent attention has rope and yarn", "model.rope_type=yarn"),
    ("positions", "model.rope_type=llama3 model.original_max_position_embeddings=64 model.low_freq_factor=4.0", 1, "model.low_freq_factor", "must be below high_freq_factor(4)", "model.low_freq_factor=1.0"),
    ("widths", "experts=4 model.moe_layer_freq=[0,1,1,1] tp=2 sp=true ffn=385 model.moe_ffn_hidden_size=64", 2, "model.ffn_hidden_size", "385 = 192 * 2 + 1", "ffn=386"),
    ("experts", "experts=4 model.moe_router_enable_expert_bias=true", 1, "model.moe_router_enable_expert_bias", "moe_router_score_function is softmax; set model.moe_router_score_function to sigmoid", "model.moe_router_score_function=sigmoid"),
    ("experts", "experts=4 model.moe_router_score_function=sigmoid model.moe_norm_topk_prob=false", 1, "model.moe_norm_topk_prob", "always rescaled", "model.moe_norm_topk_prob=true"),
    ("experts", "model.moe_grouped_gemm=true", 1, "model.moe_grouped_gemm", "the model has no experts; set it to null", "model.moe_grouped_gemm=null"),
    ("implementation", "experts=4 model.moe_token_dispatcher_type=flex", 1, "model.moe_token_dispatcher_type", "DeepEP is not installed; set it to alltoall", "model.moe_token_dispatcher_type=alltoall"),
    ("evaluation", "train.eval_ema=true", 1, "train.eval_ema", "no average is kept: ema_decay is null", "train.ema_decay=0.999"),
    ("experts", "experts=4 model.add_bias_linear=true", 1, "model.add_bias_linear", "experts here have no biases", "model.add_bias_linear=false"),
    ("experts", "experts=4 model.moe_router_num_groups=2", 1, "model.moe_router_group_topk", "=null: groups of experts", "model.moe_router_group_topk=1"),
    ("experts", "experts=5 model.moe_router_num_groups=2 model.moe_router_group_topk=1", 1, "model.num_moe_experts", "moe_router_num_groups(2), but 5 = 2 * 2 + 1", "experts=6"),
    ("experts", "experts=4 model.moe_router_num_groups=2 model.moe_router_group_topk=3", 1, "model.moe_router_group_topk", "there are moe_router_num_groups(2)", "model.moe_router_group_topk=2"),
    ("experts", "experts=4 topk=3 model.moe_router_num_groups=2 model.moe_router_group_topk=1", 1, "model.moe_router_topk", "1 groups of 2 experts hold 2", "topk=2"),
    ("experts", "experts=4 model.moe_layer_freq=[1,1]", 1, "model.moe_layer_freq", "each of num_layers(4), and has 2 entries", "model.moe_layer_freq=[0,1,1,1]"),
    ("experts", "experts=4 model.moe_layer_freq=[0,0,0,0]", 1, "model.moe_layer_freq", "no layer has experts", "model.moe_layer_freq=[0,1,1,1]"),
    ("experts", "experts=4 model.moe_layer_freq=0", 1, "model.moe_layer_freq", "n from 1", "model.moe_layer_freq=2"),
    ("experts", "model.moe_router_topk_scaling_factor=2.5", 1, "model.moe_router_topk_scaling_factor", "the model has no experts", "experts=4"),
    ("widths", "tp=2 ffn=385", 2, "model.ffn_hidden_size", "tensor_model_parallel_size(2), but 385 = 192 * 2 + 1; set it to 384 or 386", "ffn=386"),
    ("widths", "experts=4 etp=2 model.moe_ffn_hidden_size=99", 2, "model.moe_ffn_hidden_size", "expert_tensor_parallel_size(2), but 99 = 49 * 2 + 1", "etp=1"),
    ("widths", "experts=4 tp=2 sp=true model.moe_shared_expert_intermediate_size=99", 2, "model.moe_shared_expert_intermediate_size", "tensor_model_parallel_size(2)", "model.moe_shared_expert_intermediate_size=98"),
    ("experts", "model.moe_z_loss_coeff=0.001", 1, "model.moe_z_loss_coeff", "=0.001: the model has no experts; set it to null", "experts=4"),
    ("experts", "model.moe_aux_loss_coeff=0.01", 1, "model.moe_aux_loss_coeff", "=0.01: the model has no experts; set it to 0.0,", "experts=4"),
    ("experts", "model.moe_ffn_hidden_size=64", 1, "model.moe_ffn_hidden_size", "=64: the model has no experts", "experts=4"),
    ("experts", "experts=4 topk=5", 1, "model.moe_router_topk", "=5: a token cannot choose more than num_moe_experts(4); lower it to 4", "topk=4"),
    ("experts", "experts=4 topk=1", 1, "model.moe_norm_topk_prob", "=true: with moe_router_topk 1", "model.moe_norm_topk_prob=false"),
    ("experts", "experts=4 model.moe_input_jitter_eps=0.0", 1, "model.moe_input_jitter_eps", "set it to null", "model.moe_input_jitter_eps=0.01"),
    ("implementation", "model.transformer_impl=transformer_engine", 1, "model.transformer_impl", "Transformer Engine is not installed; set it to local", "model.transformer_impl=local"),
    ("starting_point", "model.init_from=/nowhere", 1, "model.init_from", "=/nowhere: there is no config.json in that folder", "model.init_from=null"),
    ("starting_point", "data.tokenizer.path=/nowhere", 1, "data.tokenizer.path", "there is no tokenizer.json", "data.tokenizer.path=null"),
    ("sequence_length", "tp=2 sp=true sequence=255", 2, "data.sequence_length", "tp(2) = 2, but 255 = 127 * 2 + 1; set it to 254 or 256", "sp=false"),
    ("sequence_length", "cp=2 sequence=258", 2, "data.sequence_length", "2 * cp(2) = 4, but 258 = 64 * 4 + 2; set it to 256 or 260", "sequence=260"),
    ("sequence_length", "tp=2 cp=2 sp=true sequence=260", 4, "data.sequence_length", "tp(2) * 2 * cp(2) = 8, but 260 = 32 * 8 + 4", "sequence=264"),
    ("template", "data.template=llama4", 1, "data.template", "alpaca, vicuna, a .jinja file, or tokenizer (its own) (did you mean llama3?)", "data.template=mine.jinja"),
    ("template", "data.template=mistral", 1, "data.template", "=mistral: no such chat template", "data.template=mistral-v3"),
    ("template", "data.template=tokenizer", 1, "data.template", "a tokenizer that is trained here has no template of its own", "data.template=vicuna"),
    ("batch", "micro=2 batch=10", 2, "train.global_batch_size", "micro_batch_size(2) * data parallel(2) = 4, but 10 = 2 * 4 + 2; set it to 8 or 12", "micro=1"),
    ("batch", "micro=2 batch=3", 2, "train.global_batch_size", "set it to 4, or", "batch=4"),
    ("schedule", "max_steps=100 optimizer.lr_warmup_steps=100", 1, "optimizer.lr_warmup_steps", "=100: the run has only train.max_steps(100)", "optimizer.lr_warmup_steps=99"),
    ("schedule", "optimizer.min_lr=0.002", 1, "optimizer.min_lr", "is above the peak optimizer.lr(0.001); lower it, e.g. to 0.0001", "optimizer.min_lr=0.001"),
    ("schedule", "optimizer.lr_num_cycles=2", 1, "optimizer.lr_num_cycles", "lr_decay_style cosine has no cycles", "optimizer.lr_decay_style=cosine_with_restarts"),
    ("schedule", "optimizer.lr_decay_style=wsd", 1, "optimizer.lr_wsd_decay_steps", "must be told how many", "optimizer.lr_wsd_decay_steps=10"),
    ("schedule", "optimizer.lr_wsd_decay_steps=10", 1, "optimizer.lr_wsd_decay_steps", "lr_decay_style cosine has no decay phase", "optimizer.lr_decay_style=wsd"),
    ("schedule", "max_steps=100 optimizer.lr_decay_style=wsd optimizer.lr_warmup_steps=10 optimizer.lr_wsd_decay_steps=91", 1, "optimizer.lr_wsd_decay_steps", "with lr_warmup_steps(10) it is more than train.max_steps(100)", "optimizer.lr_wsd_decay_steps=90"),
    ("evaluation", "train.eval_prompts=3 data.validation_rows=0", 1, "train.eval_prompts", "there are no validation rows", "data.validation=v.jsonl"),
    ("profile", "logging.profile_steps=[5,3]", 1, "logging.profile_steps", "1 <= first <= last", "logging.profile_steps=[3,5]"),
    ("evaluation", "train.early_stop_patience=2", 1, "train.early_stop_patience", "give train.eval_interval", "train.eval_interval=5"),
    ("evaluation", "train.exact_match=true data.validation_rows=0", 1, "train.exact_match", "there are no validation rows", "data.validation=v.jsonl"),
    ("sources", 'data.mixture=[{"name":"a","path":"x","weight":0}]', 1, "data.mixture", "no source has a weight above 0", 'data.mixture=[{"name":"a","path":"x","weight":1}]'),
    ("sources", 'data.mixture=[{"name":"a","path":"x","weight":1}] data.train=y.jsonl', 1, "data.train", "data.mixture takes its place", "data.mixture=null"),
    ("sources", "data.train=[]", 1, "data.train", "names no file; give one", "data.train=x.jsonl"),
    ("sources", "data.validation=[]", 1, "data.validation", "names no file", "data.validation=x.jsonl"),
    ("sources", 'data.mixture=[{"name":"a","path":[],"weight":1}]', 1, "data.mixture", "names no file", 'data.mixture=[{"name":"a","path":"x","weight":1}]'),
    ("sources", 'data.curriculum=[{"from_step":1,"weights":{"a":1}}]', 1, "data.curriculum", "there is none", "data.curriculum=null"),
    ("streaming", "data.streaming=true", 1, "train.max_steps", "does not know how many rows there are", "data.streaming=false"),
    ("streaming", "data.streaming=true", 1, "data.validation_rows", "=100: data.streaming does not know the last rows", "data.streaming=false"),
    ("adapters", "lora.rank=4 lora.target_modules=[q_poj]", 1, "lora.target_modules", "the model has no linear layer 'q_poj'; it has all-linear, q_proj", "lora.target_modules=[q_proj]"),
    ("adapters", "lora.alpha=4", 1, "lora.alpha", "lora.rank is null and all weights are trained; give lora.rank, e.g. 16, or leave this out", "lora.rank=2"),
    ("adapters", "kto.reference=base", 1, "kto.reference", "it has none: lora.rank is null; give lora.rank, or choose cached or model", "lora.rank=2"),
    ("reward_heads", "rm.heads.a.loss=ordinal", 1, "rm.heads", "loss ordinal of head 'a' must know how many classes there are; give rm.heads.a.classes", "rm.heads.a.classes=5"),
    ("reward_heads", "rm.heads.a.scale=log1p", 1, "rm.heads", "rm.heads.a.scale is log1p, and loss bradley_terry has no such option", "rm.heads.a.loss=regression"),
    ("reward_heads", "rm.heads.a.within=1", 1, "rm.heads", "rm.heads.a.within is 1.0, and loss bradley_terry has no such option", "rm.heads.a.loss=binary"),
    ("reward_heads", "rm.heads.a.label_smoothing=0.6", 1, "rm.heads", "rm.heads.a.label_smoothing is 0.6: from 0.5 on", "rm.heads.a.label_smoothing=0.1"),
    ("reward_heads", "rm.heads.a.weight=0", 1, "rm.heads", "no head has a weight above 0", "rm.heads.a.weight=1"),
    ("preference", "dpo.label_smoothing=0.1", 1, "dpo.label_smoothing", "dpo.loss sigmoid has no such option", "dpo.loss=cdpo"),
    ("preference", "dpo.loss=ipo dpo.gamma=1", 1, "dpo.gamma", "a loss that takes it: simpo", "dpo.gamma=null"),
    ("preference", "dpo.loss=robust dpo.label_smoothing=0.6", 1, "dpo.label_smoothing", "divides by 1 - 2 * label_smoothing", "dpo.label_smoothing=0.4"),
    ("preference", "dpo.loss=exo_pair dpo.label_smoothing=0", 1, "dpo.label_smoothing", "takes its logarithm", "dpo.label_smoothing=null"),
    ("preference", "dpo.loss=simpo dpo.reference_from=x", 1, "dpo.reference_from", "dpo.loss simpo has no reference", "dpo.loss=ipo"),
    ("teaching", "distill.mode=cached distill.loss=reverse_kl", 1, "distill.loss", "=reverse_kl: of a kept teacher only its most probable tokens are known", "distill.mode=model"),
    ("teaching", "distill.mode=sequence distill.loss=jensen_shannon", 1, "distill.loss", "=jensen_shannon: answers are imitated by cross-entropy", "distill.loss=forward_kl"),
    ("teaching", "distill.mode=sequence distill.ce_weight=0.5", 1, "distill.ce_weight", "=0.5: distill.mode sequence has no other loss", "distill.mode=model"),
    ("teaching", "distill.teacher_cache=x", 1, "distill.teacher_cache", "=x: distill.mode model keeps no probabilities", "distill.mode=cached"),
    ("teaching", 'distill.teacher_parallel={"tensor_model_parallel_size":2}', 1, "distill.teacher_parallel", "stands on the student's grid; leave it out", "distill.mode=sequence"),
    ("teaching", 'distill.replay=x data.mixture=[{"name":"a","path":"x","weight":1}]', 1, "distill.replay", "=x: it makes a mixture of data.train and itself", "data.mixture=null"),
    ("teaching", "distill.replay=x data.streaming=true max_steps=9 data.validation_rows=0", 1, "distill.replay", "leave out data.mixture and data.streaming", "data.streaming=false"),
    ("teaching", "train.forgetting_data=x", 1, "train.forgetting_data", "=x: it is looked at when the run evaluates; give train.eval_interval", "train.eval_interval=5"),
    ("teaching", "train.forgetting_data=x train.eval_interval=5 data.validation_rows=0", 1, "train.forgetting_data", "and a validation set", "data.validation=v.jsonl"),
    ("rounds", "rounds.n=8", 1, "rounds.n", "there are no rounds: rounds.count is null", "rounds.count=2"),
    ("rounds", "rounds.count=2 dpo.reference_from=x", 1, "dpo.reference_from", "anchored to the policy that it starts from", "dpo.reference_from=null"),
    ("rounds", "rounds.count=2 dpo.reference_cache=x", 1, "dpo.reference_cache", "a reference of its own", "dpo.reference_cache=null"),
    ("rounds", "rounds.count=2 train.eval_interval=4", 1, "train.eval_interval", "holds none out", "train.eval_interval=null"),
    ("rounds", "rounds.count=2 train.exact_match=true", 1, "train.exact_match", "holds none out", "train.exact_match=false"),
    ("rounds", "rounds.count=2 train.eval_prompts=4", 1, "train.eval_prompts", "holds none out", "train.eval_prompts=0"),
    ("judges", "best_of_n.scorer=reward_model", 1, "best_of_n.reward_model.checkpoints", "=null: no reward model is named, and it is to score; give a run of megalign rm train, or another best_of_n.scorer", "best_of_n.reward_model.checkpoints=runs/rm"),
    ("judges", "rso.reward_model.checkpoints=[a,b] rso.scorer=exact_match", 1, "rso.scorer", "=exact_match: rso.reward_model is given, and this scorer does not ask it; set it to reward_model", "rso.scorer=reward_model"),
    ("streaming", "data.streaming=true data.order_by_length=true", 1, "data.order_by_length", "has a window of them", "data.streaming=false"),
]  # fmt: skip


@pytest.mark.parametrize("rule,keys,world,field,words,mend", CASES, ids=[f"{case[0]}-{i}" for i, case in enumerate(CASES)])
def test_a_rule(rule, keys, world, field, words, mend):
    broken, layout = recipe(keys), layout_of(recipe(keys), world)
    (one,) = (each for each in rules.RULES if each.__name__ == rule)
    fired = {problem.field: str(problem) for problem in one(broken, layout)}
    assert field in fired and words in fired[field]
    assert violations(broken, world)[field] == fired[field]
    assert violations(recipe(f"{keys} {mend}"), world) == {}


def test_extras_can_be_chosen_where_they_are_installed(monkeypatch):
    """DeepEP and Transformer Engine's grouped experts: chosen by configuration, refused where they make no sense."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    flex = "experts=4 model.moe_token_dispatcher_type=flex"
    assert violations(recipe(f"{flex} ep=2"), 2) == {}
    assert "nothing to dispatch" in violations(recipe(flex), 1)["model.moe_token_dispatcher_type"]
    engine = "experts=4 model.transformer_impl=transformer_engine"
    assert violations(recipe(engine), 1) == {}
    assert "experts are grouped" in violations(recipe(f"{engine} model.moe_grouped_gemm=false"), 1)["model.moe_grouped_gemm"]


def test_every_rule_has_a_case_and_a_reason():
    assert {rule.__name__ for rule in rules.RULES} == {case[0] for case in CASES}
    assert all(rule.__doc__ for rule in rules.RULES)


def test_a_preset_and_a_folder_are_two_sources_of_the_shape(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    both = recipe(f"preset=tiny-moe model.init_from={tmp_path}")
    assert list(violations(both)) == ["model.preset"]
    assert violations(recipe(f"model.init_from={tmp_path}")) == {}


def test_the_tokenizer_must_fit_once_it_is_known():
    check_vocabulary(recipe(), 10**6)
    check_vocabulary(recipe("model.vocab_size=500"), 500)
    with pytest.raises(ConfigError, match="model.vocab_size=500: the tokenizer has 501 ids; set it to null, or to 501"):
        check_vocabulary(recipe("model.vocab_size=500"), 501)


def test_all_violations_at_once():
    broken = recipe("tp=3 experts=5 ep=2 sequence=257 cp=2 batch=7 micro=2")
    found = violations(broken, 12)
    assert set(found) >= {
        "model.num_attention_heads", "model.num_moe_experts", "parallel.sequence_parallel",
        "data.sequence_length", "train.global_batch_size",
    }  # fmt: skip
    with pytest.raises(ConfigError, match=f"^{len(found)} problems in the recipe:\n  - "):
        check(broken, 12)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid(preset):
    assert violations(recipe(f"preset={preset}")) == {}


@pytest.mark.parametrize(
    "keys,ranks",
    [
        ("", 1),
        ("tp=2 pp=2 cp=2", 8),
        ("tp=2 dp=3", 6),
        ("preset=tiny-moe ep=2", 2),
        ("preset=tiny-moe ep=2 pp=2", 4),
        ("preset=tiny-moe ep=2 tp=2 sp=true", 2),  # expert ranks are the tensor-parallel ones
        ("preset=tiny-moe ep=4 tp=2 sp=true pp=2", 8),
        ("preset=tiny-moe ep=2 etp=2 tp=2 sp=true", 4),
        ("preset=tiny-moe ep=4 cp=2", 4),
        ("preset=tiny-moe ep=2 dp=4", 4),
    ],
)
def test_ranks_of_a_bare_start(keys, ranks):
    """The least world on which the layout is valid: brute force over smaller ones."""
    keys = f"batch=24 {keys}"
    assert world_size_of(recipe(keys)) == ranks
    assert violations(recipe(keys)) == {}
    assert all(violations(recipe(keys), fewer) for fewer in range(1, ranks))


def test_ep_without_experts_is_said_for_a_bare_start():
    assert "parallel.expert_model_parallel_size" in violations(recipe("ep=2"))


def test_a_row_divides_into_the_chunks_of_every_rank():
    assert sequence_multiple(layout_of(recipe()), False) == 1
    assert sequence_multiple(layout_of(recipe("tp=2")), False) == 1
    assert sequence_multiple(layout_of(recipe("tp=2")), True) == 2
    assert sequence_multiple(layout_of(recipe("tp=2 cp=4")), True) == 16


def test_chat_templates_and_tokenizers(tmp_path):
    from megalign.config.schema import TEMPLATES
    from megalign.data import templates

    assert tuple(templates.TEMPLATES) == TEMPLATES
    for name in TEMPLATES:
        assert violations(recipe(f"data.template={name}")) == {}
    (tmp_path / "t.model").touch()
    for path in (tmp_path, tmp_path / "t.model"):
        assert violations(recipe(f"data.template=tokenizer data.tokenizer.path={path}")) == {}

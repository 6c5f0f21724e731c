"""Rules of the model's shape on a layout, in the form of `layout_rules`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from megalign.config.errors import Problem, not_a_multiple, shown
from megalign.config.layout import Layout, layers_with_experts
from megalign.config.schema import Recipe

_LOWER_TP = "choose a parallel.tensor_model_parallel_size that fits"
_NEEDS_EXPERTS = (
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_aux_loss_coeff",
    "moe_z_loss_coeff",
    "moe_input_jitter_eps",
    "moe_grouped_gemm",
    "moe_expert_capacity_factor",
    "moe_router_enable_expert_bias",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_topk_scaling_factor",
)


def heads(recipe: Recipe, layout: Layout) -> Iterator[Problem]:
    """Each rank holds whole heads (transformer_config.py:924), whole key/value groups or an equal part of one
    (:940); a group serves equally many heads (attention.py:294); RoPE turns pairs of channels."""
    model, tp = recipe.model, layout.tp
    count, groups = model.num_attention_heads, model.num_query_groups or model.num_attention_heads
    if model.multi_latent_attention:
        yield from latent_attention(recipe, layout)
        return
    if count % tp:
        what = f"tensor_model_parallel_size({tp})"
        yield not_a_multiple("model.num_attention_heads", count, tp, what, _LOWER_TP)
    if count % groups:
        rule = f"must divide num_attention_heads({count})"
        yield Problem("model.num_query_groups", rule, f"choose one of {_divisors(count)}", groups)
    if groups % tp and tp % groups:
        rule = f"must be a multiple or a divisor of tensor_model_parallel_size({tp})"
        yield Problem("model.num_query_groups", rule, _LOWER_TP, groups)
    if model.kv_channels is None and model.hidden_size % count:  # megatron rounds down and says nothing
        what = f"num_attention_heads({count})"
        yield not_a_multiple("model.hidden_size", model.hidden_size, count, what, "give model.kv_channels")
        return
    channels = model.kv_channels or model.hidden_size // count
    if channels % 2 and model.position_embedding_type == "rope":
        rule = f"the size of a head is {channels}, and rotary embeddings need an even one"
        yield Problem("model.kv_channels", rule, f"set it to {channels + 1}", model.kv_channels)
    elif count % tp == 0 and tp % groups == 0 and (width := (count + 2 * groups) * channels) % tp:
        sizes = f"({count} + 2 * {groups}) * {channels} = {width}"  # layers.py:842; can fail only where tp > groups
        rule = f"queries, keys and values are {sizes} wide, no multiple of tensor_model_parallel_size({tp})"
        yield Problem("model.kv_channels", rule, _LOWER_TP, model.kv_channels)


def latent_attention(recipe: Recipe, layout: Layout) -> Iterator[Problem]:
    """Each rank holds whole heads, and every head has its own keys and values, made from the shared latent
    (multi_latent_attention.py:492)."""
    model, tp = recipe.model, layout.tp
    count = model.num_attention_heads
    if count % tp:
        yield not_a_multiple("model.num_attention_heads", count, tp, f"tensor_model_parallel_size({tp})", _LOWER_TP)
    if model.num_query_groups not in (None, count):
        rule = f"with multi-latent attention each of the {count} heads has its own keys"
        yield Problem("model.num_query_groups", rule, "set it to null", model.num_query_groups)
    if model.kv_channels is not None:
        rule = "multi-latent attention has qk_head_dim, qk_pos_emb_head_dim and v_head_dim instead"
        yield Problem("model.kv_channels", rule, "set it to null", model.kv_channels)
    for key in ("qk_layernorm", "add_qkv_bias", "add_bias_linear"):
        if getattr(model, key):
            rule = "multi-latent attention has norms on its latents and no biases"
            yield Problem(f"model.{key}", rule, "set it to false", True)
    if model.qk_pos_emb_head_dim % 2:
        rule = "rotary embeddings turn pairs of channels"
        yield Problem("model.qk_pos_emb_head_dim", rule, f"set it to {model.qk_pos_emb_head_dim + 1}", model.qk_pos_emb_head_dim)
    if model.normalization != "RMSNorm" or model.position_embedding_type != "rope":
        key = "normalization" if model.normalization != "RMSNorm" else "position_embedding_type"
        rule = "multi-latent attention comes with RMSNorm and rotary embeddings"
        yield Problem(f"model.{key}", rule, "leave it out", getattr(model, key))


def positions(recipe: Recipe, layout: Layout) -> Iterator[Problem]:
    """A table of positions has no frequencies to scale, and its rows end; scaled frequencies need the length
    that they were trained with. MLA knows plain and YaRN frequencies (multi_latent_attention.py:132)."""
    model = recipe.model
    if model.position_embedding_type == "learned_absolute":
        if model.rope_type != "rope":
            rule = "position_embedding_type learned_absolute has no frequencies"
            yield Problem("model.rope_type", rule, "set it to rope", model.rope_type)
        if recipe.data.sequence_length > model.max_position_embeddings:
            rule = f"the table of positions has max_position_embeddings({model.max_position_embeddings}) rows"
            yield Problem("data.sequence_length", rule, f"lower it to {model.max_position_embeddings}", recipe.data.sequence_length)
    elif model.rope_type == "rope":
        if model.rotary_scaling_factor != 1:
            rule = "rope_type rope does not scale"
            yield Problem("model.rotary_scaling_factor", rule, "set model.rope_type to llama3 or yarn, or this to 1", model.rotary_scaling_factor)
    else:
        if model.original_max_position_embeddings is None:
            rule = f"rope_type {model.rope_type} scales from it"
            yield Problem("model.original_max_position_embeddings", rule, "give the length that the model was first trained with", None)
        if model.rope_type == "llama3" and model.multi_latent_attention:
            yield Problem("model.rope_type", "multi-latent attention has rope and yarn", "choose one of them", "llama3")
        if model.rope_type == "llama3" and model.low_freq_factor >= model.high_freq_factor:
            rule = f"must be below high_freq_factor({model.high_freq_factor:g}): between them the scale is mixed"
            yield Problem("model.low_freq_factor", rule, "lower it", model.low_freq_factor)


def widths(recipe: Recipe, layout: Layout) -> Iterator[Problem]:
    """The inner widths of MLPs are cut evenly: dense and shared over tp, experts over etp (layers.py:842)."""
    model, tp, etp = recipe.model, layout.tp, layout.etp
    over_tp, over_etp = f"tensor_model_parallel_size({tp})", f"expert_tensor_parallel_size({etp})"
    if not all(layers_with_experts(model)) and model.ffn_hidden_size % tp:
        yield not_a_multiple("model.ffn_hidden_size", model.ffn_hidden_size, tp, over_tp, _LOWER_TP)
    if model.num_moe_experts is None:
        return
    width = model.moe_ffn_hidden_size or model.ffn_hidden_size
    if width % etp:
        fix = "lower parallel.expert_tensor_parallel_size"
        yield not_a_multiple("model.moe_ffn_hidden_size", width, etp, over_etp, fix)
    shared = model.moe_shared_expert_intermediate_size
    if shared and shared % tp:
        yield not_a_multiple("model.moe_shared_expert_intermediate_size", shared, tp, over_tp, _LOWER_TP)


def experts(recipe: Recipe, layout: Layout) -> Iterator[Problem]:
    """A router chooses at most all experts; with one choice and normalised weights the weight is always 1 and
    the router gets no gradient (transformer_config.py:1634); jitter draws from an interval that must not be
    empty (router.py:523); keys of experts without experts would be silently unused."""
    model = recipe.model
    if model.num_moe_experts is None:
        for key in _NEEDS_EXPERTS:
            if value := getattr(model, key):
                unset = shown(type(model).model_fields[key].default)
                fix = f"set it to {unset}, or give model.num_moe_experts"
                yield Problem(f"model.{key}", "the model has no experts", fix, value)
        return
    topk = model.moe_router_topk
    yield from routing(recipe, layout)
    if topk > model.num_moe_experts:
        rule = f"a token cannot choose more than num_moe_experts({model.num_moe_experts})"
        yield Problem("model.moe_router_topk", rule, f"lower it to {model.num_moe_experts} or less", topk)
    if topk == 1 and model.moe_norm_topk_prob and model.moe_router_score_function == "softmax":
        rule = "with moe_router_topk 1 the rescaled weight is always 1 and the router cannot learn"
        yield Problem("model.moe_norm_topk_prob", rule, "set it to false", True)
    if model.moe_input_jitter_eps == 0:
        rule = "the interval [1 - 0, 1 + 0] is empty"
        yield Problem("model.moe_input_jitter_eps", rule, "set it to null", 0.0)


def routing(recipe: Recipe, layout: Layout) -> Iterator[Problem]:
    """The bias steers a choice by sigmoid scores (transformer_config.py:1593), which are always rescaled when there
    are several (moe_utils.py:724); groups are of equal size, and hold enough experts (:1654)."""
    model, experts = recipe.model, recipe.model.num_moe_experts or 0
    sigmoid = model.moe_router_score_function == "sigmoid"
    if model.moe_router_enable_expert_bias and not sigmoid:
        rule = "the bias is added to sigmoid scores; moe_router_score_function is softmax"
        yield Problem("model.moe_router_enable_expert_bias", rule, "set model.moe_router_score_function to sigmoid, or this to false", True)
    if sigmoid and not model.moe_norm_topk_prob and model.moe_router_topk > 1:
        yield Problem("model.moe_norm_topk_prob", "sigmoid scores are always rescaled to sum 1", "set it to true", False)
    if model.add_bias_linear:
        rule = "experts here have no biases (shared_experts.py:47 and the router's would need their own rows)"
        yield Problem("model.add_bias_linear", rule, "set it to false", True)
    groups, chosen = model.moe_router_num_groups, model.moe_router_group_topk
    if (groups is None) != (chosen is None):
        key = "moe_router_num_groups" if groups is None else "moe_router_group_topk"
        yield Problem(f"model.{key}", "groups of experts and how many a token may choose belong together", "give both, or neither", None)
    elif groups is not None and chosen is not None:
        if experts % groups:
            yield not_a_multiple("model.num_moe_experts", experts, groups, f"moe_router_num_groups({groups})", "choose another number of groups")
        elif chosen > groups:
            yield Problem("model.moe_router_group_topk", f"there are moe_router_num_groups({groups})", f"lower it to {groups} or less", chosen)
        elif model.moe_router_topk > chosen * (experts // groups):
            rule = f"{chosen} groups of {experts // groups} experts hold {chosen * (experts // groups)}"
            yield Problem("model.moe_router_topk", rule, "lower it, or raise model.moe_router_group_topk", model.moe_router_topk)
    pattern = model.moe_layer_freq
    if isinstance(pattern, int):
        if pattern < 1:
            yield Problem("model.moe_layer_freq", "every n-th layer has experts, n from 1", "set it to 1", pattern)
    elif len(pattern) != model.num_layers or set(pattern) - {0, 1}:
        rule = f"a list needs 0 or 1 for each of num_layers({model.num_layers}), and has {len(pattern)} entries"
        yield Problem("model.moe_layer_freq", rule, "e.g. [0] + [1] * (num_layers - 1)", pattern)
    elif not any(pattern):
        yield Problem("model.moe_layer_freq", "no layer has experts", "set model.num_moe_experts to null", pattern)


def prediction(recipe: Recipe, layout: Layout) -> Iterator[Problem]:
    """A prediction module embeds the token ahead on the last stage, which has a copy of the word embedding and none of
    a table of positions; a tied head there would be a third copy, without a gradient (language_module.py:210)."""
    model, train, field = recipe.model, recipe.train, "model.mtp_num_layers"
    if model.mtp_num_layers is None:
        return
    if model.position_embedding_type == "learned_absolute":
        yield Problem(field, "prediction modules come with rotary positions", "set it to null", model.mtp_num_layers)
    if model.share_embeddings_and_output_weights and layout.pp > 1:
        rule = f"with share_embeddings_and_output_weights it needs one stage, and pipeline_model_parallel_size is {layout.pp}"
        yield Problem(field, rule, "set it to null, or parallel.pipeline_model_parallel_size to 1", model.mtp_num_layers)
    if model.mtp_loss_scaling_factor == 0 and "mtp" not in train.freeze:
        rule = "without a loss the modules' weights would only decay"
        yield Problem("model.mtp_loss_scaling_factor", rule, "add mtp to train.freeze, or raise it", 0.0)


def implementation(recipe: Recipe, layout: Layout) -> Iterator[Problem]:
    """Transformer Engine is an extra that needs CUDA."""
    wanted, name = recipe.model.transformer_impl, "transformer_engine"
    if wanted == name and importlib.util.find_spec(name) is None:
        fix = "set it to local, or install transformer-engine"
        yield Problem("model.transformer_impl", "Transformer Engine is not installed", fix, wanted)
    model = recipe.model
    if wanted == name and model.moe_grouped_gemm is False:
        yield Problem("model.moe_grouped_gemm", "Transformer Engine's experts are grouped", "set it to null, or model.transformer_impl to local", False)
    if model.moe_token_dispatcher_type == "flex":
        if importlib.util.find_spec("deep_ep") is None:
            yield Problem("model.moe_token_dispatcher_type", "DeepEP is not installed", "set it to alltoall, or install deep_ep", "flex")
        elif layout.etp * layout.ep == 1:  # token_dispatcher.py:1346
            yield Problem("model.moe_token_dispatcher_type", "there is one expert-parallel rank, and nothing to dispatch", "set it to alltoall", "flex")
    special = {"multi_latent_attention": False, "moe_layer_freq": 1, "normalization": "RMSNorm", "mtp_num_layers": None}
    for key, plain in special.items():
        if wanted == name and getattr(model, key) != plain:
            rule = f"its layers here are built for model.{key} {shown(plain)} alone"
            yield Problem("model.transformer_impl", rule, "set it to local", wanted)


def starting_point(recipe: Recipe, layout: Layout) -> Iterator[Problem]:
    """One source of the shape, and folders that exist."""
    model, tokenizer = recipe.model, recipe.data.tokenizer
    if model.preset and model.init_from:
        rule = "init_from gives the shape too, by its config.json"
        yield Problem("model.preset", rule, "remove one of the two, here e.g. with model.preset=null", model.preset)
    if model.init_from and not any(Path(model.init_from, name).exists() for name in ("config.json", "checkpoints", "manifest.json")):
        fix = "give the path of a Hugging Face folder, or of a run or checkpoint of ours"
        yield Problem("model.init_from", "there is no config.json in that folder", fix, model.init_from)
    if tokenizer.path and not _holds_tokenizer(Path(tokenizer.path)):
        fix = "give the path of a Hugging Face folder, or of a SentencePiece .model file"
        rule = "there is no tokenizer.json and no .model file in that folder"
        yield Problem("data.tokenizer.path", rule, fix, tokenizer.path)


def _holds_tokenizer(path: Path) -> bool:
    return (path / "tokenizer.json").is_file() or path.is_file() or any(path.glob("*.model"))


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)


RULES = (heads, positions, widths, experts, prediction, implementation, starting_point)

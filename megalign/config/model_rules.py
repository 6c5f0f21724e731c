"""Rules of the model's shape on a layout, in the form of `layout_rules`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from megalign.config.errors import Problem, not_a_multiple, shown
from megalign.config.layout import Layout
from megalign.config.schema import Recipe

_LOWER_TP = "choose a parallel.tensor_model_parallel_size that fits"
_NEEDS_EXPERTS = (
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_aux_loss_coeff",
    "moe_z_loss_coeff",
    "moe_input_jitter_eps",
    "moe_expert_capacity_factor",
)


def heads(recipe: Recipe, layout: Layout) -> Iterator[Problem]:
    """Each rank holds whole heads (transformer_config.py:924), whole key/value groups or an equal part of one
    (:940); a group serves equally many heads (attention.py:294); RoPE turns pairs of channels."""
    model, tp = recipe.model, layout.tp
    count, groups = model.num_attention_heads, model.num_query_groups or model.num_attention_heads
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
    if channels % 2:
        rule = f"the size of a head is {channels}, and rotary embeddings need an even one"
        yield Problem("model.kv_channels", rule, f"set it to {channels + 1}", model.kv_channels)
    elif count % tp == 0 and tp % groups == 0 and (width := (count + 2 * groups) * channels) % tp:
        sizes = f"({count} + 2 * {groups}) * {channels} = {width}"  # layers.py:842; can fail only where tp > groups
        rule = f"queries, keys and values are {sizes} wide, no multiple of tensor_model_parallel_size({tp})"
        yield Problem("model.kv_channels", rule, _LOWER_TP, model.kv_channels)


def widths(recipe: Recipe, layout: Layout) -> Iterator[Problem]:
    """The inner widths of MLPs are cut evenly: dense and shared over tp, experts over etp (layers.py:842)."""
    model, tp, etp = recipe.model, layout.tp, layout.etp
    over_tp, over_etp = f"tensor_model_parallel_size({tp})", f"expert_tensor_parallel_size({etp})"
    if model.num_moe_experts is None:
        if model.ffn_hidden_size % tp:
            yield not_a_multiple("model.ffn_hidden_size", model.ffn_hidden_size, tp, over_tp, _LOWER_TP)
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
    if topk > model.num_moe_experts:
        rule = f"a token cannot choose more than num_moe_experts({model.num_moe_experts})"
        yield Problem("model.moe_router_topk", rule, f"lower it to {model.num_moe_experts} or less", topk)
    if topk == 1 and model.moe_norm_topk_prob:
        rule = "with moe_router_topk 1 the rescaled weight is always 1 and the router cannot learn"
        yield Problem("model.moe_norm_topk_prob", rule, "set it to false", True)
    if model.moe_input_jitter_eps == 0:
        rule = "the interval [1 - 0, 1 + 0] is empty"
        yield Problem("model.moe_input_jitter_eps", rule, "set it to null", 0.0)


def implementation(recipe: Recipe, layout: Layout) -> Iterator[Problem]:
    """Transformer Engine is an extra that needs CUDA."""
    wanted, name = recipe.model.transformer_impl, "transformer_engine"
    if wanted == name and importlib.util.find_spec(name) is None:
        fix = "set it to local, or install transformer-engine"
        yield Problem("model.transformer_impl", "Transformer Engine is not installed", fix, wanted)


def starting_point(recipe: Recipe, layout: Layout) -> Iterator[Problem]:
    """One source of the shape, and folders that exist."""
    model, tokenizer = recipe.model, recipe.data.tokenizer
    if model.preset and model.init_from:
        rule = "init_from gives the shape too, by its config.json"
        yield Problem("model.preset", rule, "remove one of the two, here e.g. with model.preset=null", model.preset)
    if model.init_from and not Path(model.init_from, "config.json").is_file():
        fix = "give the path of a Hugging Face folder"
        yield Problem("model.init_from", "there is no config.json in that folder", fix, model.init_from)
    if tokenizer.path and not _holds_tokenizer(Path(tokenizer.path)):
        fix = "give the path of a Hugging Face folder, or of a SentencePiece .model file"
        rule = "there is no tokenizer.json and no .model file in that folder"
        yield Problem("data.tokenizer.path", rule, fix, tokenizer.path)


def _holds_tokenizer(path: Path) -> bool:
    return (path / "tokenizer.json").is_file() or path.is_file() or any(path.glob("*.model"))


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)


RULES = (heads, widths, experts, implementation, starting_point)

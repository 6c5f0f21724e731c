"""LoRA in a recipe: which linear layers a model has, by PEFT's names for them, which are adapted, and what adapters weigh.

Nothing is built here. Megatron holds some linear layers of a Hugging Face model side by side in one; PEFT, and so a recipe,
names each of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from megalign.config.errors import Problem
from megalign.config.layout import Layout, layers_with_experts
from megalign.config.schema import LoraConfig, ModelConfig, Recipe
from megalign.config.suggest import closest

ALL = "all-linear"  # PEFT's word
ALSO_CALLED = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}  # Mixtral's experts


@dataclass(frozen=True)
class Linear:
    """A linear layer as a Hugging Face model has it, inside Megatron's `module`."""

    module: str
    name: str
    inputs: int
    outputs: int
    cut: Literal["outputs", "inputs"] | None  # over tensor ranks, or an expert's
    copies: int = 1  # experts in a layer
    expert: bool = False


def linear_layers(model: ModelConfig, *, experts: bool) -> list[Linear]:
    """Those of one layer, with experts or with a dense MLP, in the order of their rows in Megatron's modules."""
    found = _attention(model)
    if not experts:
        return found + _mlp(model, model.ffn_hidden_size)
    expert_width = model.moe_ffn_hidden_size or model.ffn_hidden_size
    found += [Linear(x.module, x.name, x.inputs, x.outputs, x.cut, model.num_moe_experts or 0, True) for x in _mlp(model, expert_width)]
    shared = model.moe_shared_expert_intermediate_size
    return found + (_mlp(model, shared) if shared else [])


def _attention(model: ModelConfig) -> list[Linear]:
    width, heads = model.hidden_size, model.num_attention_heads
    if model.multi_latent_attention:
        rank, latent = model.q_lora_rank, model.kv_lora_rank
        queries = heads * (model.qk_head_dim + model.qk_pos_emb_head_dim)
        direct = [Linear("linear_q_proj", "q_proj", width, queries, "outputs")]
        down_and_up = [] if rank is None else [Linear("linear_q_down_proj", "q_a_proj", width, rank, None), Linear("linear_q_up_proj", "q_b_proj", rank, queries, "outputs")]
        return [
            *(down_and_up or direct),
            Linear("linear_kv_down_proj", "kv_a_proj_with_mqa", width, latent + model.qk_pos_emb_head_dim, None),
            Linear("linear_kv_up_proj", "kv_b_proj", latent, heads * (model.qk_head_dim + model.v_head_dim), "outputs"),
            Linear("linear_proj", "o_proj", heads * model.v_head_dim, width, "inputs"),
        ]
    groups, size = model.num_query_groups or heads, model.kv_channels or width // heads
    rows = {"q_proj": heads * size, "k_proj": groups * size, "v_proj": groups * size}
    return [*(Linear("linear_qkv", name, width, count, "outputs") for name, count in rows.items()), Linear("linear_proj", "o_proj", heads * size, width, "inputs")]


def _mlp(model: ModelConfig, inner: int) -> list[Linear]:
    first = ("gate_proj", "up_proj") if model.gated_linear_unit else ("up_proj",)
    return [*(Linear("linear_fc1", name, model.hidden_size, inner, "outputs") for name in first), Linear("linear_fc2", "down_proj", inner, model.hidden_size, "inputs")]


def linear_names(model: ModelConfig) -> dict[str, set[str]]:
    """What `lora.target_modules` may say of this model -> the linear layers that it stands for: PEFT's names and Megatron's."""
    layers = [layer for experts in sorted(set(layers_with_experts(model))) for layer in linear_layers(model, experts=experts)]
    known: dict[str, set[str]] = {ALL: {layer.name for layer in layers}}
    for layer in layers:
        known.setdefault(layer.name, set()).add(layer.name)
        known.setdefault(layer.module, set()).add(layer.name)
    return known | {also: {name} for also, name in ALSO_CALLED.items() if name in known}


def targets(model: ModelConfig, lora: LoraConfig) -> set[str]:
    """The linear layers to adapt, by PEFT's names. The recipe has passed `adapters`."""
    asked = [lora.target_modules] if isinstance(lora.target_modules, str) else lora.target_modules
    return set().union(*(linear_names(model)[name] for name in asked))


def scale(lora: LoraConfig) -> float:
    """alpha / r; with use_rslora alpha / sqrt(r) (arXiv:2312.03732). alpha defaults to 2 r."""
    assert lora.rank is not None
    return alpha(lora) / (math.sqrt(lora.rank) if lora.use_rslora else lora.rank)


def alpha(lora: LoraConfig) -> float:
    """The recipe's, or 2 r."""
    return 2.0 * (lora.rank or 0) if lora.alpha is None else lora.alpha


def rank_adapters(recipe: Recipe, layout: Layout, layers: Sequence[int]) -> tuple[int, int]:
    """(of all but the experts, of experts): parameters of the adapters that one rank holds on these layers."""
    model, lora = recipe.model, recipe.lora
    if lora.rank is None:
        return 0, 0
    names, has_experts, counts = targets(model, lora), layers_with_experts(model), [0, 0]
    for number in layers:
        for layer in linear_layers(model, experts=has_experts[number]) if number < model.num_layers else ():
            if layer.name in names:
                ranks = layout.etp if layer.expert else layout.tp
                inputs, outputs = (size // (ranks if layer.cut == side else 1) for side, size in (("inputs", layer.inputs), ("outputs", layer.outputs)))
                counts[layer.expert] += lora.rank * (inputs + outputs) * layer.copies // (layout.ep if layer.expert else 1)
    return counts[0], counts[1]


def count_adapters(model: ModelConfig, lora: LoraConfig) -> int:
    """Parameters of all adapters: r (in + out) for every adapted matrix."""
    if lora.rank is None:
        return 0
    names = targets(model, lora)
    layers = [layer for experts in layers_with_experts(model) for layer in linear_layers(model, experts=experts)]
    return sum(lora.rank * (layer.inputs + layer.outputs) * layer.copies for layer in layers if layer.name in names)


def adapters(recipe: Recipe, layout: Layout) -> Iterator[Problem]:
    """Targets that the model has; nothing about adapters where there are none."""
    model, lora = recipe.model, recipe.lora
    against_base = [name for name in ("dpo", "kto") if getattr(recipe, name).reference == "base"]
    if lora.rank is None:
        plain = LoraConfig()
        for name in LoraConfig.model_fields:
            if getattr(lora, name) != getattr(plain, name):
                yield Problem(f"lora.{name}", "says how to adapt, but lora.rank is null and all weights are trained", "give lora.rank, e.g. 16, or leave this out", getattr(lora, name))
        for name in against_base:
            yield Problem(f"{name}.reference", "is the model without its adapters, and it has none: lora.rank is null", "give lora.rank, or choose cached or model", "base")
        return
    asked = [lora.target_modules] if isinstance(lora.target_modules, str) else lora.target_modules
    known = linear_names(model)
    if not asked:
        yield Problem("lora.target_modules", "names nothing to adapt", f"write {ALL}, or some of {', '.join(known)}", asked)
    for name in asked:
        if name not in known:
            yield Problem("lora.target_modules", f"the model has no linear layer {name!r}", f"it has {', '.join(known)}{closest(name, list(known))}", lora.target_modules)
    if model.transformer_impl != "local":
        yield Problem("lora.rank", f"adapters are made beside the linear layers of our layer spec, and model.transformer_impl is {model.transformer_impl}", "set that to local, or this to null", lora.rank)
    if against_base and lora.modules_to_save:
        yield Problem("lora.modules_to_save", f"is trained beside the adapters, and {against_base[0]}.reference base has only them off", "leave it out, or choose cached or model", lora.modules_to_save)
    for name in against_base:
        if (given := getattr(recipe, name).reference_from) is not None:
            yield Problem(f"{name}.reference_from", f"{name}.reference base compares with the model's own base", "leave it out, or choose cached or model", given)

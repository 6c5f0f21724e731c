"""LoRA on a built model, whatever it was built for: one call freezes it and adds the adapters of the recipe's `lora`.

Adapters of a layer stand in the layer, as `decoder.layers.0.self_attention.linear_qkv.lora_A_q_proj`; initial values depend on
the seed and that name alone, so that every layout starts alike and a checkpoint of one opens on another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megalign.config.adapters import linear_layers, scale, targets
from megalign.config.errors import ConfigError, Problem
from megalign.config.layout import layers_with_experts
from megalign.config.schema import LoraConfig, ModelConfig
from megalign.models.freeze import matches
from megalign.models.hf.shards import local_from_full
from megalign.models.weights import full_shape, generator_of, named_parameters
from megalign.parallel.grid import Grid
from megalign.parallel.lora import adapt, is_adapter

HEADS = "heads"  # of reward models: trained as a whole beside the adapters


def add_adapters(chunks: Sequence[Any], model: ModelConfig, lora: LoraConfig, grid: Grid, seed: int) -> None:
    """Freeze the model, give its linear layers adapters, and initialise them (collective). Nothing to do where lora.rank is null.

    What stays trainable besides: heads, and what `lora.modules_to_save` names. A router's expert bias keeps its value too.
    Call it when the model has its weights, before parameters are placed and DDP is made. Raises ConfigError for a name that
    matches nothing, and where a rank would be left with nothing to train.
    """
    if lora.rank is None:
        return
    _freeze(chunks, lora, grid)
    names = targets(model, lora)
    held: dict[str, dict[str, int]] = {}  # Megatron's module -> the linear layers in it, with their rows
    for experts in sorted(set(layers_with_experts(model))):
        for layer in linear_layers(model, experts=experts):
            held.setdefault(layer.module, {})[layer.name] = layer.outputs
    for chunk in chunks:
        chunk.config.moe_router_bias_update_rate = 0.0
        for path, module in list(chunk.decoder.named_modules()):
            kind = path.rpartition(".")[2]
            if names & set(held.get(kind, ())):
                total, here = sum(held[kind].values()), module.weight.shape[0]  # an expert's share is that of the dense MLP
                parts = [(name, rows * here // total) for name, rows in held[kind].items()]
                groups = (model.num_query_groups or model.num_attention_heads) // grid.tensor.size if kind == "linear_qkv" else 1
                adapt(module, parts, names, rank=lora.rank, scale=scale(lora), dropout=lora.dropout, groups=groups)
    _initialise(chunks, grid, seed)
    _refuse_idle(chunks, lora, grid)


def _freeze(chunks: Sequence[Any], lora: LoraConfig, grid: Grid) -> None:
    used: set[str] = set()
    for name, parameter, _ in named_parameters(chunks, grid):
        kept = {pattern for pattern in (HEADS, *lora.modules_to_save) if matches(name, pattern)}
        parameter.requires_grad_(bool(kept))
        used |= kept
    everywhere: list[Any] = [None] * grid.world
    dist.all_gather_object(everywhere, used)
    unknown = [pattern for pattern in lora.modules_to_save if not any(pattern in names for names in everywhere)]
    if unknown:
        rule, fix = "no parameter has such a name", "a glob over names like output_layer.weight, or a dotted part: output_layer"
        raise ConfigError([Problem("lora.modules_to_save", rule, fix, pattern) for pattern in unknown])


@torch.no_grad()
def _initialise(chunks: Sequence[Any], grid: Grid, seed: int) -> None:
    """A uniform in +-1/sqrt(in) (kaiming with a = sqrt(5), as in PEFT), B zero. Drawn full, then cut."""
    for name, parameter, place in named_parameters(chunks, grid):
        if is_adapter(name):
            full = torch.zeros(full_shape(name, parameter.shape, place))
            if ".lora_A_" in name:
                bound = 1 / math.sqrt(full.shape[1])
                full.uniform_(-bound, bound, generator=generator_of(seed, name))
            parameter.copy_(local_from_full(name, full, place))


def _refuse_idle(chunks: Sequence[Any], lora: LoraConfig, grid: Grid) -> None:
    trained: list[Any] = [None] * grid.world
    dist.all_gather_object(trained, any(parameter.requires_grad for chunk in chunks for parameter in chunk.parameters()))
    if not all(trained):
        rule = f"leaves rank {trained.index(False)} of {grid.world} with no parameter to train, and its pipeline stage with no gradient"
        raise ConfigError([Problem("lora.target_modules", rule, "adapt more, or use fewer pipeline stages", lora.target_modules)])

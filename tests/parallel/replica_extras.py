"""Parameters of a user's own in a megatron model, one of every kind that nobody reduces by default; drawn by name, so that
every layout holds the same ones. `declared` says how they lie; an entry left out is not declared."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed.nn
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from megalign.parallel.grid import Grid
from megalign.parallel.placement import declare

WIDTH = 64
RANK = 3
DECLARED: dict[str, dict[str, Any]] = {
    "table": dict(tensor="sequence"),  # positions added after the sequence is cut
    "lora_a": dict(tensor="partial"),  # before a column-parallel factor
    "lora_b": dict(shard="tensor"),
    "head_scale": dict(tensor="partial"),  # each rank scales the heads it has
    "shared_scale": dict(tensor="sequence", pipeline="partial"),  # the same vector on every stage
    "expert_a": dict(shard="expert", expert_tensor="partial"),
    "expert_b": dict(shard=("expert", "expert_tensor")),
    "pool": dict(tensor="duplicated"),  # weighs a sum over all tokens that an all-reduce makes, in backward too; under sequence parallelism: partial
}


def known_cuts() -> None:
    """How they are cut, for comparisons by name."""
    from megalign.models.hf import shards

    layer = "decoder.layers.{layer}."
    shards.CUTS |= dict.fromkeys(("table", "shared_scale", layer + "pool", layer + "self_attention.linear_qkv.lora_a"), shards.Whole)
    shards.CUTS |= dict.fromkeys((layer + "self_attention.core_attention.head_scale", layer + shards.EXPERT + "linear_fc1.expert_a"), shards.Whole)
    shards.CUTS |= {layer + "self_attention.linear_qkv.lora_b": shards.Rows, layer + shards.EXPERT + "linear_fc1.expert_b": shards.GatedRows}


def drawn(name: str, *shape: int) -> torch.Tensor:
    """Normal(0, 0.1) of a generator seeded by the name."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def add_extras(models: list[Any], grid: Grid, kinds: tuple[str, ...] = tuple(DECLARED), declared: dict[str, dict[str, Any]] | None = None) -> None:
    """Register the parameters of `kinds` and use them in forward."""
    said = DECLARED if declared is None else declared

    def new(owner: Any, attribute: str, kind: str, value: torch.Tensor) -> torch.nn.Parameter:
        parameter = torch.nn.Parameter(value.contiguous().to(models[0].config.params_dtype))
        owner.register_parameter(attribute, parameter)
        how: dict[str, Any] = dict(tensor="partial") if kind == "pool" and models[0].config.sequence_parallel else said.get(kind, {})
        return declare(parameter, **how) if kind in said else parameter

    for chunk in models:
        config, tp = chunk.config, grid.tensor
        if "table" in kinds and chunk.pre_process:
            table = new(chunk, "table", "table", drawn("table", 64, WIDTH))
            chunk.embedding.register_forward_hook(_add_table(table, config, tp))
        shared = new(chunk, "shared_scale", "shared_scale", drawn("shared_scale", WIDTH)) if "shared_scale" in kinds else None
        for layer in chunk.decoder.layers:
            number = layer.layer_number - 1
            if "lora_a" in kinds:
                qkv = layer.self_attention.linear_qkv
                a = new(qkv, "lora_a", "lora_a", drawn(f"{number}.lora_a", RANK, WIDTH))
                full = drawn(f"{number}.lora_b", qkv.weight.shape[0] * tp.size, RANK)
                b = new(qkv, "lora_b", "lora_b", full.chunk(tp.size)[tp.rank])
                qkv.register_forward_hook(_lora(a, b, config, tp))
            if "head_scale" in kinds:
                core = layer.self_attention.core_attention
                scale = new(core, "head_scale", "head_scale", 1 + drawn(f"{number}.head_scale", config.kv_channels))
                core.register_forward_hook(lambda module, inputs, output, scale=scale: (output.unflatten(-1, (-1, len(scale))) * scale).flatten(-2))
            if shared is not None:
                layer.register_forward_hook(lambda module, inputs, output, s=shared: (output[0] * (1 + s), *output[1:]))
            if "pool" in kinds:
                layer.register_forward_hook(_pool(new(layer, "pool", "pool", drawn(f"{number}.pool", WIDTH)), config, tp))
            if "expert_a" in kinds and hasattr(layer.mlp, "experts"):
                _expert_loras(layer.mlp.experts, number, grid, new)


def _add_table(table: torch.nn.Parameter, config: Any, tp: Any) -> Any:
    def hook(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        first = tp.rank * output.shape[0] if config.sequence_parallel else 0
        return output + table[first : first + output.shape[0]].unsqueeze(1)

    return hook


def _lora(a: torch.nn.Parameter, b: torch.nn.Parameter, config: Any, tp: Any) -> Any:
    def hook(module: Any, inputs: Any, output: Any) -> Any:
        x = inputs[0]
        x = gather_from_sequence_parallel_region(x, group=tp.group) if config.sequence_parallel else copy_to_tensor_model_parallel_region(x, group=tp.group)
        return output[0] + F.linear(F.linear(x, a), b), *output[1:]

    return hook


def _pool(weight: torch.nn.Parameter, config: Any, tp: Any) -> Any:
    def hook(module: Any, inputs: Any, output: Any) -> Any:
        mine = output[0].detach()  # each rank sums some of the tokens; backward, the group adds up what each makes of the result
        tokens = mine.shape[0] * (tp.size if config.sequence_parallel else 1)
        mine = mine if config.sequence_parallel else mine.chunk(tp.size)[tp.rank]
        pooled = weight * mine.sum(0, keepdim=True) / tokens
        return output[0] + (torch.distributed.nn.all_reduce(pooled, group=tp.group) if tp.size > 1 else pooled), *output[1:]

    return hook


def _expert_loras(experts: Any, layer: int, grid: Grid, new: Any) -> None:
    etp = grid.expert_tensor
    for local, expert in enumerate(experts.local_experts):
        number = grid.expert.rank * len(experts.local_experts) + local
        fc1 = expert.linear_fc1
        a = new(fc1, "expert_a", "expert_a", drawn(f"{layer}.{number}.expert_a", RANK, WIDTH))
        full = drawn(f"{layer}.{number}.expert_b", fc1.weight.shape[0] * etp.size, RANK)
        b = new(fc1, "expert_b", "expert_b", torch.cat([half.chunk(etp.size)[etp.rank] for half in full.chunk(2)]))
        fc1.register_forward_hook(lambda module, inputs, output, a=a, b=b: (output[0] + F.linear(F.linear(inputs[0], a), b), *output[1:]))

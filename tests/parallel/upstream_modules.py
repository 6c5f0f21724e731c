"""Modules as users add them to a model: value head, LoRA, one scale for all layers. Upstream reduces none of their copies.

Their parameters depend on their names alone, like the model's (weights.initialise).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Models = list[Any]
Prepare = Callable[[Models, Any], None]


def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
    from hashlib import sha256

    generator = torch.Generator().manual_seed(int.from_bytes(sha256(name.encode()).digest()[:7], "big"))
    return torch.empty(shape).normal_(0, 0.1, generator=generator)


def known_cuts() -> None:
    """How the added parameters are cut, for the comparison."""
    from megalign.models.hf import shards

    layer = "decoder.layers.{layer}."
    shards.CUTS |= {
        "value_head.weight": shards.Whole,
        "layer_scale": shards.Whole,
        layer + "self_attention.linear_proj.lora_a": shards.Columns,
        layer + "self_attention.linear_proj.lora_b": shards.Whole,
        layer + "self_attention.linear_qkv.lora_a": shards.Whole,
        layer + "self_attention.linear_qkv.lora_b": shards.Rows,
    }


class ValueHead(torch.nn.Module):
    """One number for each hidden state, added to it: the gradient is that of a head whose loss sees every token."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = torch.nn.Parameter(drawn("value_head", (1, size)))

    def forward(self, module: Any, inputs: Any, hidden: Tensor) -> Tensor:
        return hidden + torch.nn.functional.linear(hidden, self.weight)


def value_head(declared: bool) -> Prepare:
    def add(models: Models, grid: Any) -> None:
        known_cuts()
        for chunk in models:
            if chunk.post_process:
                chunk.value_head = ValueHead(chunk.config.hidden_size)
                chunk.decoder.final_layernorm.register_forward_hook(chunk.value_head.forward)
                if declared:
                    from megalign.parallel.placement import declare

                    declare(chunk.value_head.weight, tensor="sequence")

    return add


RANK = 4


def lora(declared: bool) -> Prepare:
    """Adapters of the projections of attention: one factor cut like the layer, one whole on every rank."""

    def add(models: Models, grid: Any) -> None:
        from megatron.core.tensor_parallel.mappings import (
            copy_to_tensor_model_parallel_region,
            gather_from_sequence_parallel_region,
            reduce_from_tensor_model_parallel_region,
            reduce_scatter_to_sequence_parallel_region,
        )

        known_cuts()
        size, rank, tokens_cut = grid.tensor.size, grid.tensor.rank, models[0].config.sequence_parallel

        def of_rows(layer: Any, inputs: Any, output: Any) -> Any:
            part = torch.nn.functional.linear(inputs[0], layer.lora_a)
            low = (reduce_scatter_to_sequence_parallel_region if tokens_cut else reduce_from_tensor_model_parallel_region)(part, group=grid.tensor.group)
            return output[0] + torch.nn.functional.linear(low, layer.lora_b), output[1]

        def of_columns(layer: Any, inputs: Any, output: Any) -> Any:
            low = torch.nn.functional.linear(inputs[0], layer.lora_a)
            if tokens_cut:
                low = gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True, group=grid.tensor.group)
            else:
                low = copy_to_tensor_model_parallel_region(low, group=grid.tensor.group)
            return output[0] + torch.nn.functional.linear(low, layer.lora_b), output[1]

        for chunk in models:
            for block in chunk.decoder.layers:
                proj, qkv = block.self_attention.linear_proj, block.self_attention.linear_qkv
                number = block.layer_number
                proj.lora_a = torch.nn.Parameter(drawn(f"{number} proj a", (RANK, proj.weight.shape[1] * size)).chunk(size, 1)[rank].contiguous())
                proj.lora_b = torch.nn.Parameter(drawn(f"{number} proj b", (proj.weight.shape[0], RANK)))
                qkv.lora_a = torch.nn.Parameter(drawn(f"{number} qkv a", (RANK, qkv.weight.shape[1])))
                qkv.lora_b = torch.nn.Parameter(drawn(f"{number} qkv b", (qkv.weight.shape[0] * size, RANK)).chunk(size, 0)[rank].contiguous())
                for cut in (proj.lora_a, qkv.lora_b):
                    setattr(cut, "tensor_model_parallel", True)  # noqa: B010
                proj.register_forward_hook(of_rows)
                qkv.register_forward_hook(of_columns)
                if declared:
                    from megalign.parallel.placement import declare

                    declare(proj.lora_b, tensor="sequence")
                    declare(qkv.lora_a, tensor="sequence")

    return add


def head_norm(declared: bool) -> Prepare:
    """A norm of each head's output, one for all heads, as gated linear attention has it; each tensor rank has some of the heads."""

    def add(models: Models, grid: Any) -> None:
        from megalign.models.hf import shards
        from megalign.parallel.layers import RMSNorm

        shards.CUTS["decoder.layers.{layer}.self_attention.core_attention.out_norm.weight"] = shards.Whole
        for chunk in models:
            for block in chunk.decoder.layers:
                core, width = block.self_attention.core_attention, chunk.config.kv_channels
                core.out_norm = RMSNorm(chunk.config, width)
                core.register_forward_hook(lambda module, inputs, output, width=width: module.out_norm(output.unflatten(-1, (-1, width))).flatten(-2))
                if declared:
                    from megalign.parallel.placement import declare

                    declare(core.out_norm.weight, tensor="partial")

    return add


def layer_scale(declared: bool) -> Prepare:
    """One parameter that every layer uses, so that every stage holds a copy of it."""

    def add(models: Models, grid: Any) -> None:
        known_cuts()
        for chunk in models:
            chunk.layer_scale = torch.nn.Parameter(drawn("scale", (chunk.config.hidden_size,)))
            for block in chunk.decoder.layers:
                block.mlp.register_forward_hook(lambda module, inputs, out, scale=chunk.layer_scale: (out[0] * (1 + scale), out[1]))
            if declared:
                from megalign.parallel.placement import declare

                declare(chunk.layer_scale, tensor="sequence", pipeline="partial")

    return add

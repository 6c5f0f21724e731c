"""Full named tensors in and out of a sharded model: initialisation, loading, streaming.

Names are global (true layer and expert numbers), in the spelling of the local layer spec. Initial weights
depend on the seed and the name alone, so that every layout starts from the same model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megalign.config.schema import ModelConfig
from megalign.models.heads import initial_head, is_head
from megalign.models.hf.shards import (
    Columns,
    GatedRows,
    Place,
    Rows,
    cut_of,
    full_from_locals,
    global_name,
    local_from_full,
)
from megalign.parallel.grid import Grid
from megalign.parallel.optimizer import finish_parameters


def place_of(chunk: Any, grid: Grid) -> Place:
    """Where a model chunk of this rank stands in the whole model."""
    config = chunk.config
    experts = (config.num_moe_experts or 0) // grid.expert.size
    return Place(
        tensor_rank=grid.tensor.rank,
        tensor_size=grid.tensor.size,
        expert_tensor_rank=grid.expert_tensor.rank,
        expert_tensor_size=grid.expert_tensor.size,
        layer_offset=get_transformer_layer_offset(config, vp_stage=chunk.vp_stage, pp_rank=grid.pipeline.rank),
        expert_offset=experts * grid.expert.rank,
        gated=config.gated_linear_unit,
    )


def named_parameters(chunks: Sequence[Any], grid: Grid) -> Iterator[tuple[str, Tensor, Place]]:
    """(global name, local parameter, place) of everything this rank holds; a tied output layer under its own name."""
    for chunk in map(_unwrapped, chunks):
        place = place_of(chunk, grid)
        for name, parameter in chunk.named_parameters():
            yield global_name(name, place.layer_offset, place.expert_offset), parameter, place


def named_weights(chunks: Sequence[Any], grid: Grid) -> Iterator[tuple[str, Tensor, Place]]:
    """`named_parameters`, and what a model is made of beside them: the routers' FP32 expert biases."""
    yield from named_parameters(chunks, grid)
    for chunk in map(_unwrapped, chunks):
        place = place_of(chunk, grid)
        for name, buffer in chunk.named_buffers():
            if name.endswith(".router.expert_bias"):
                yield global_name(name, place.layer_offset, place.expert_offset), buffer, place


@torch.no_grad()
def load_full(chunks: Sequence[Any], grid: Grid, source: Callable[[str, Tensor, Place], Tensor]) -> None:
    """Fill every weight with its part of `source(name, local weight, place)`, the full tensor."""
    for name, parameter, place in named_weights(chunks, grid):
        local = local_from_full(name, source(name, parameter, place), place)
        if local.shape != parameter.shape:  # copy_ would broadcast
            raise ValueError(f"{name}: this rank's part has shape {tuple(local.shape)}, its parameter {tuple(parameter.shape)}")
        parameter.copy_(local)


def initialise(chunks: Sequence[Any], model: ModelConfig, grid: Grid, seed: int) -> None:
    """Normal(0, std) weights, output projections scaled by 1/sqrt(2 L) (GPT-2), norms one, biases zero.

    Drawn full, on the CPU, from a generator seeded by (seed, name), then cut.
    """
    narrow = model.init_method_std / math.sqrt(2 * model.num_layers)
    tied = model.share_embeddings_and_output_weights

    def draw(name: str, parameter: Tensor, place: Place) -> Tensor:
        shape = full_shape(name, parameter.shape, place)
        if is_head(name):
            return initial_head(name, shape, generator_of(seed, name))
        if name.endswith(("layernorm.weight", ".enorm.weight", ".hnorm.weight")):
            return torch.ones(shape)
        if name.endswith("bias"):
            return torch.zeros(shape)
        if tied and name == "output_layer.weight":
            name = "embedding.word_embeddings.weight"
        std = narrow if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else model.init_method_std
        return torch.empty(shape).normal_(0, std, generator=generator_of(seed, name))

    load_full(chunks, grid, draw)


def generator_of(seed: int, name: str) -> torch.Generator:
    """The source of a weight's random numbers."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def full_shape(name: str, local: torch.Size, place: Place) -> tuple[int, ...]:
    """Shape of the uncut tensor of which a rank has `local`."""
    cut, shape = cut_of(name, place.gated), list(local)
    size = place.expert_tensor_size if ".local_experts." in name else place.tensor_size
    if cut in (Rows, GatedRows):
        shape[0] *= size
    elif cut is Columns:
        shape[1] *= size
    return tuple(shape)


def stream_full(
    chunks: Sequence[Any], grid: Grid, value: Callable[[Tensor], Tensor] | None = None, only: Callable[[str], bool] = lambda name: True
) -> Iterator[tuple[str, Tensor]]:
    """Yield every full tensor once, on rank 0, one at a time; the other ranks yield nothing (collective).

    value: what to stream of the parameters, e.g. their gradients; None: all weights. only: which global names. Consume it to
    the end on every rank.
    """
    finish_parameters(chunks)
    everything = named_parameters(chunks, grid) if value else named_weights(chunks, grid)
    mine = [entry for entry in everything if only(entry[0])]
    gated = all(place.gated for _, _, place in mine)
    tied = any(chunk.share_embeddings_and_output_weights for chunk in map(_unwrapped, chunks))
    # A tied output layer is the embedding again, kept a second time by the last stage; so is that of prediction modules.
    copies = {"output_layer.weight"} if tied else set()
    copies |= set() if grid.is_first_stage else {"embedding.word_embeddings.weight"}
    owned = [name for name, _, _ in mine if _is_owner(name, grid) and name not in copies]
    owners: list[Any] = [None] * grid.world
    dist.all_gather_object(owners, owned)
    local = {name: parameter for name, parameter, _ in mine}
    for owner, names in enumerate(owners):
        for name in names:
            axis = grid.expert_tensor if ".local_experts." in name else grid.tensor
            full = None
            if owner in dist.get_process_group_ranks(axis.group):
                part = (value(local[name]) if value else local[name].detach()).contiguous()
                parts = [torch.empty_like(part) for _ in range(axis.size)]
                dist.all_gather(parts, part, group=axis.group)
                full = full_from_locals(name, parts, gated)
            if owner != 0 and grid.rank in (0, owner):
                full = _move(full if grid.rank == owner else None, owner)
            if grid.rank == 0:
                assert full is not None
                yield name, full


def _unwrapped(chunk: Any) -> Any:
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def _is_owner(name: str, grid: Grid) -> bool:
    """The first of the ranks that hold parts or copies of this tensor."""
    if ".local_experts." in name:
        return grid.expert_tensor.rank == 0 and grid.expert_data.rank == 0
    return grid.tensor.rank == 0 and grid.data_context.rank == 0


def _move(full: Tensor | None, owner: int) -> Tensor | None:
    """From `owner` to rank 0."""
    from megalign.parallel.init import device

    if full is not None:
        dist.send_object_list([tuple(full.shape), full.dtype], dst=0)
        dist.send(full.contiguous(), dst=0)
        return None
    description: list[Any] = [None, None]
    dist.recv_object_list(description, src=owner)
    received = torch.empty(description[0], dtype=description[1], device=device())
    dist.recv(received, src=owner)
    return received

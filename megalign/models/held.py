"""Keys for the auditor: which tensors of a model must be equal on which ranks, from the table of cuts, not from flags."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from megalign.models.hf.shards import Place, Whole, cut_of, global_name
from megalign.models.hf.table import ConversionError
from megalign.models.weights import named_parameters, place_of
from megalign.parallel.audit.held import Held
from megalign.parallel.grid import Grid
from megalign.parallel.placement import is_cut_layer


def held_by(chunks: Sequence[Any], grid: Grid) -> list[Held]:
    """Parameters and persistent buffers of this rank.

    A parameter outside the table is cut only if it was declared so (`megalign.parallel.placement.declare`), or belongs to a
    layer that always is. What nobody said anything about is taken for a copy, and compared.
    """
    owners = {id(p): type(m).__name__ for chunk in chunks for m in chunk.modules() for p in m.parameters(recurse=False)}
    found = []
    for name, parameter, place in named_parameters(chunks, grid):
        found.append(Held(name, _key(name, parameter, place, chunks, owners[id(parameter)]), parameter))
    for chunk in map(_unwrapped, chunks):
        place = place_of(chunk, grid)
        for prefix, module in chunk.named_modules():
            for own, buffer in module.named_buffers(recurse=False):
                if own not in module._non_persistent_buffers_set and buffer is not None and own != "_extra_state":
                    name = global_name(f"{prefix}.{own}" if prefix else own, place.layer_offset, place.expert_offset)
                    found.append(Held(name, name, buffer, is_buffer=True))
    return found


def _key(name: str, parameter: Tensor, place: Place, chunks: Sequence[Any], owner: str) -> str:
    expert = ".experts." in name
    axis, rank = ("etp", place.expert_tensor_rank) if expert else ("tp", place.tensor_rank)
    try:
        cut = cut_of(name, place.gated) is not Whole
    except ConversionError:
        declared = getattr(parameter, "placement", None)
        in_cut_layer = is_cut_layer(owner) and not (owner.endswith("RowParallelLinear") and name.endswith(".bias"))
        cut = bool({"tensor", "expert_tensor"} & set(declared.shard)) if declared is not None else in_cut_layer
    if name == "output_layer.weight" and any(_unwrapped(chunk).share_embeddings_and_output_weights for chunk in chunks):
        name = "embedding.word_embeddings.weight"
    return f"{name}|{axis}{rank}" if cut else name


def _unwrapped(chunk: Any) -> Any:
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk

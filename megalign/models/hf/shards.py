"""How each Megatron weight is cut over tensor-parallel ranks, and how local names become global ones.

A table again: name -> kind of cut. Plain tensors; the caller does the communication. A name outside the
table is an error: a sharded weight taken for a replicated one would load, and be wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalign.models.hf.table import ConversionError


@dataclass(frozen=True)
class Place:
    """Where a rank (or one of its virtual stages) stands in the model.

    `layer_offset` and `expert_offset`: global number of its first layer and of its first expert.
    `gated`: the first projection of an MLP is [gate; up].
    """

    tensor_rank: int = 0
    tensor_size: int = 1
    expert_tensor_rank: int = 0
    expert_tensor_size: int = 1
    layer_offset: int = 0
    expert_offset: int = 0
    gated: bool = True


class Whole:
    """The same on every rank."""

    @staticmethod
    def cut(full: Tensor, rank: int, size: int) -> Tensor:
        return full

    @staticmethod
    def join(locals_: Sequence[Tensor]) -> Tensor:
        """The first rank's copy. That all copies are alike is the auditor's matter."""
        return locals_[0]


class Rows:
    """Column-parallel: a rank has a run of output rows. For the interleaved QKV these are whole groups."""

    @staticmethod
    def cut(full: Tensor, rank: int, size: int) -> Tensor:
        return full.chunk(size, dim=0)[rank]

    @staticmethod
    def join(locals_: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(locals_), dim=0)


class Columns:
    """Row-parallel: a rank has a run of input columns."""

    @staticmethod
    def cut(full: Tensor, rank: int, size: int) -> Tensor:
        return full.chunk(size, dim=1)[rank]

    @staticmethod
    def join(locals_: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(locals_), dim=1)


class GatedRows:
    """[gate; up]: a rank has a run of gate rows and the same run of up rows, again gate first."""

    @staticmethod
    def cut(full: Tensor, rank: int, size: int) -> Tensor:
        return torch.cat([half.chunk(size, dim=0)[rank] for half in full.chunk(2, dim=0)])

    @staticmethod
    def join(locals_: Sequence[Tensor]) -> Tensor:
        gates, ups = zip(*(local.chunk(2, dim=0) for local in locals_))
        return torch.cat([*gates, *ups])


Cut = type[Whole] | type[Rows] | type[Columns] | type[GatedRows]
EXPERT = "mlp.experts.local_experts.{expert}."
LAYER_CUTS: dict[str, Cut] = {
    "input_layernorm.weight": Whole,
    "self_attention.linear_qkv.weight": Rows,
    "self_attention.q_layernorm.weight": Whole,
    "self_attention.k_layernorm.weight": Whole,
    "self_attention.linear_proj.weight": Columns,
    "self_attention.linear_q_proj.weight": Rows,
    "self_attention.linear_q_down_proj.weight": Whole,
    "self_attention.linear_q_up_proj.weight": Rows,
    "self_attention.linear_kv_down_proj.weight": Whole,
    "self_attention.kv_layernorm.weight": Whole,
    "self_attention.linear_kv_up_proj.weight": Rows,
    "pre_mlp_layernorm.weight": Whole,
    "mlp.linear_fc1.weight": GatedRows,
    "mlp.linear_fc2.weight": Columns,
    "mlp.router.weight": Whole,
    "mlp.router.expert_bias": Whole,
    EXPERT + "linear_fc1.weight": GatedRows,  # over the expert-tensor ranks
    EXPERT + "linear_fc2.weight": Columns,
    "mlp.shared_experts.linear_fc1.weight": GatedRows,
    "mlp.shared_experts.linear_fc2.weight": Columns,
    "mlp.shared_experts.gate_weight": Whole,
    "input_layernorm.bias": Whole,
    "self_attention.linear_qkv.bias": Rows,
    "self_attention.linear_proj.bias": Whole,
    "pre_mlp_layernorm.bias": Whole,
    "mlp.linear_fc1.bias": GatedRows,
    "mlp.linear_fc2.bias": Whole,
}
CUTS: dict[str, Cut] = {
    "embedding.word_embeddings.weight": Rows,
    "embedding.position_embeddings.weight": Whole,
    **{"decoder.layers.{layer}." + name: cut for name, cut in LAYER_CUTS.items()},
    **{"mtp.layers.{layer}.transformer_layer." + name: cut for name, cut in LAYER_CUTS.items()},
    **dict.fromkeys([f"mtp.layers.{{layer}}.{norm}.{part}" for norm in ("enorm", "hnorm", "final_layernorm") for part in ("weight", "bias")], Whole),
    "mtp.layers.{layer}.eh_proj.weight": Rows,
    "decoder.final_layernorm.weight": Whole,
    "decoder.final_layernorm.bias": Whole,
    "output_layer.weight": Rows,
}

# Spellings of the other layer specs: Transformer Engine fuses a norm into the linear after it and numbers
# the weights of grouped experts.
SYNONYMS = (
    (r"^(module\.)+", ""),  # wrappers: DDP, Float16Module
    (r"self_attention\.linear_qkv\.layer_norm_weight$", "input_layernorm.weight"),
    (r"mlp\.linear_fc1\.layer_norm_weight$", "pre_mlp_layernorm.weight"),
    (r"mlp\.experts\.(linear_fc[12])\.weight(\d+)$", r"mlp.experts.local_experts.\2.\1.weight"),
)


def global_name(local_name: str, layer_offset: int = 0, expert_offset: int = 0) -> str:
    """A rank's parameter name with the model's layer and expert numbers, in the local layer spec's spelling."""
    for pattern, replacement in SYNONYMS:
        local_name = re.sub(pattern, replacement, local_name)
    for prefix, offset in (("decoder.layers.", layer_offset), ("local_experts.", expert_offset)):
        local_name = re.sub(rf"(?<={re.escape(prefix)})\d+", lambda number, add=offset: str(int(number[0]) + add), local_name)
    return local_name


def local_from_full(name: str, full: Tensor, place: Place) -> Tensor:
    """The part of the full weight `name` (global name) that the rank at `place` holds; may be a view of it.

    Raises ConversionError for a name outside the table and when the ranks do not divide the dimension.
    """
    cut = cut_of(name, place.gated)
    rank, size = _position(name, place)
    dim = 1 if cut is Columns else 0
    pieces = full.shape[dim] // 2 if cut is GatedRows else full.shape[dim]
    if cut is not Whole and pieces % size:
        axis = "expert_tensor_parallel_size" if _is_expert(name) else "tensor_model_parallel_size"
        raise ConversionError(f"{name}: {pieces} {'columns' if dim else 'rows'} are no multiple of {axis} = {size}; lower it")
    return cut.cut(full, rank, size).contiguous()


def full_from_locals(name: str, locals_: Sequence[Tensor], gated: bool = True) -> Tensor:
    """The full weight from the parts of all (expert-)tensor ranks, in rank order: inverse of `local_from_full`."""
    return cut_of(name, gated).join(locals_)


def cut_of(name: str, gated: bool = True) -> Cut:
    """The kind of cut of a global name. gated: MLPs are. Raises ConversionError for a name outside the table."""
    if name.startswith("heads."):  # of reward models: every tensor rank has them whole
        return Whole
    if adapter := re.fullmatch(r"(.+\.)lora_([AB])_\w+", name):
        base = cut_of(adapter[1] + "weight", gated)
        if base is Columns:
            return Columns if adapter[2] == "A" else Whole
        return Rows if base is not Whole and adapter[2] == "B" else Whole  # a part of its own, gate and up too
    kind = re.sub(r"^((?:decoder|mtp)\.layers\.)\d+", r"\1{layer}", name)
    kind = re.sub(r"(local_experts\.)\d+", r"\1{expert}", kind)
    if kind not in CUTS:
        raise ConversionError(f"no rule says how {name!r} is cut over tensor-parallel ranks; add it to CUTS in {__name__}")
    cut = CUTS[kind]
    return Rows if cut is GatedRows and not gated else cut


def _is_expert(name: str) -> bool:
    return ".local_experts." in name


def _position(name: str, place: Place) -> tuple[int, int]:
    if _is_expert(name):
        return place.expert_tensor_rank, place.expert_tensor_size
    return place.tensor_rank, place.tensor_size

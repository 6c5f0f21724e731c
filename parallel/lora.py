"""Low-rank adapters (LoRA, Hu et al., arXiv:2106.09685) beside frozen linear layers, under TP, SP, EP and ETP.

    y = x W' + scale * (x A') B'          A [r, in], B [out, r]; B is 0 at first, and y that of W alone

A layer that holds several of a Hugging Face model's linear layers side by side (q, k, v; gate, up) has an A and a B for each
of them, as PEFT has: `lora_A_q_proj`, `lora_B_q_proj`. How they lie, and what happens between A and B:

                          A                            between                               B
    column-parallel       whole, on this rank's tokens SP: the tokens are gathered           rows cut
    row-parallel          columns cut                  summed (SP: and the tokens cut)       whole, on this rank's tokens
    whole (MLA's down)    whole, on this rank's tokens nothing                               whole, on this rank's tokens
    expert, column        whole over ETP, partial      nothing: the dispatcher has gathered  rows cut over ETP
    expert, row           columns cut over ETP         nothing: the dispatcher will sum      whole over ETP, partial

What travels is r numbers a token, not the layer's width.

# S positions, B sequences, r rank
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import Parameter

from megalign.parallel.placement import declare

PREFIX = "lora_"


@dataclass
class Adapters:
    """Those of one layer. parts: (name, output rows on this rank) of all linear layers that it holds, adapted or not."""

    parts: tuple[tuple[str, int], ...]
    names: tuple[str, ...]  # the adapted ones, in the order of `parts`
    groups: int  # how often the parts alternate in the rows: 1, or this rank's query groups
    rank: int
    scale: float
    dropout: float
    enabled: bool = True


def adapt(
    layer: Any, parts: Sequence[tuple[str, int]], names: Collection[str], *, rank: int, scale: float, dropout: float = 0.0, groups: int = 1
) -> None:
    """Give a layer adapters for `names` among its `parts`, uninitialised, and declare how they lie.

    layer: megatron's ColumnParallelLinear or RowParallelLinear, or a linear layer that is whole on every tensor rank; its class
    becomes one that adds them. parts: (name, output rows on this rank) in the order of the layer's rows. groups: see `Adapters`.
    """
    for name, rows in parts:
        if name in names:
            for factor, shape in (("A", (rank, layer.weight.shape[1])), ("B", (rows, rank))):
                layer.register_parameter(f"{PREFIX}{factor}_{name}", declare(Parameter(layer.weight.new_empty(shape)), **_lies(layer, factor)))
    layer.adapters = Adapters(tuple(parts), tuple(name for name, _ in parts if name in names), groups, rank, scale, dropout)
    layer.__class__ = adapted(type(layer))


def _lies(layer: Any, factor: str) -> dict[str, Any]:
    """The declaration of A or B: see the module's table."""
    if not isinstance(layer, (ColumnParallelLinear, RowParallelLinear)):
        return {"tensor": "sequence"}
    cut = factor == ("B" if isinstance(layer, ColumnParallelLinear) else "A")
    if layer.is_expert:
        return {"shard": ("expert", "expert_tensor")} if cut else {"shard": "expert", "expert_tensor": "partial"}
    return {"shard": "tensor"} if cut else {"tensor": "sequence"}


class Adapted(torch.nn.Module):
    """Mixed into a layer's class by `adapt`. The parameters stand in the layer itself: who waits at its door for gathered weights
    (DDP) waits for them too."""

    adapters: Adapters
    weight: Any

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """The layer's own output, and to it what the adapters add. Without an input: what the layer gives then (`experts.py`)."""
        found = super().forward(*inputs, **options)
        if not inputs or not self.adapters.enabled:
            return found
        output, bias = found
        return output + self.delta(inputs[0]), bias

    def delta(self, x: Tensor) -> Tensor:
        """x [S, B, in on this rank] -> [S, B, out on this rank]."""
        a = self.adapters
        low = self._between(F.linear(self.dropped(x), torch.cat(self.factors("A")))) * a.scale
        pieces = [F.linear(part, b) for part, b in zip(low.split(a.rank, dim=-1), self.factors("B"), strict=True)]
        return self.side_by_side(pieces)

    def _between(self, low: Tensor) -> Tensor:
        layer: Any = self
        if not isinstance(layer, (ColumnParallelLinear, RowParallelLinear)) or layer.is_expert:
            return low
        if isinstance(layer, ColumnParallelLinear):
            if layer.sequence_parallel:  # backward: each rank's part of the gradient is summed, and its tokens kept
                return gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True, group=layer.tp_group)
            return copy_to_tensor_model_parallel_region(low, group=layer.tp_group)
        if layer.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(low, group=layer.tp_group)
        return reduce_from_tensor_model_parallel_region(low, group=layer.tp_group)

    def factors(self, which: str) -> list[Tensor]:
        """The A or the B of every adapted part."""
        return [getattr(self, f"{PREFIX}{which}_{name}") for name in self.adapters.names]

    def side_by_side(self, pieces: Sequence[Tensor]) -> Tensor:
        """What each adapted part gives [..., its rows], in the order of the layer's rows; zeros for the others."""
        a, given = self.adapters, dict(zip(self.adapters.names, pieces, strict=True))
        if len(a.parts) == 1:
            return pieces[0]
        some = pieces[0]
        whole = [given[name] if name in given else some.new_zeros(*some.shape[:-1], rows) for name, rows in a.parts]
        return torch.cat([piece.unflatten(-1, (a.groups, -1)) for piece in whole], dim=-1).flatten(-2)

    def dropped(self, x: Tensor) -> Tensor:
        """Dropout on the input. Ranks that hold the same x draw the same mask; where x differs, each draws its own."""
        a, layer = self.adapters, cast(Any, self)
        if not self.training or a.dropout == 0:
            return x
        tracker: Any = get_cuda_rng_tracker()
        if getattr(layer, "is_expert", False):
            # Not from the common generator: ranks have different numbers of rows, and would leave it in different states.
            with tracker.fork(get_expert_parallel_rng_tracker_name()):
                return F.dropout(x, a.dropout)
        if isinstance(layer, RowParallelLinear) or layer.config.sequence_parallel:
            with tracker.fork():
                return F.dropout(x, a.dropout)
        return F.dropout(x, a.dropout)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """The layer's, with the adapters cut as they lie."""
        layer: Any = self
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # pyright: ignore[reportAttributeAccessIssue]
        mine = {name: p for name, p in layer.named_parameters(recurse=False) if name.startswith(PREFIX)}
        cut = {ColumnParallelLinear: (f"{PREFIX}B_", 0), RowParallelLinear: (f"{PREFIX}A_", 1)}
        kind, axis = next((found for base, found in cut.items() if isinstance(layer, base)), ("no such name", 0))
        axes = {name: axis for name in mine if name.startswith(kind)}
        return state | make_sharded_tensors_for_checkpoint(
            mine, prefix, axes, sharded_offsets, tp_group=layer.tp_group, dp_cp_group=metadata["dp_cp_group"]
        )


@cache
def adapted(kind: type) -> type:
    """The class of layers of class `kind` with adapters."""
    return type(f"Lora{kind.__name__}", (Adapted, kind), {})


def grouped_delta(layers: Sequence[Any], x: Tensor, multiply: Callable[[Tensor, list[Tensor]], Tensor]) -> Tensor:
    """What adapters add to one projection of several experts, x [T, in] sorted by expert -> [T, out].

    multiply(x, weights): each expert's rows of x times its weight'. It wants rows of 16 bytes: ranks are padded with zeros.
    """
    first: Adapted = layers[0]
    a, pad = first.adapters, -first.adapters.rank % (16 // x.element_size())
    low = multiply(first.dropped(x), [torch.cat([F.pad(factor, (0, 0, 0, pad)) for factor in layer.factors("A")]) for layer in layers]) * a.scale
    factors = [[F.pad(factor, (0, pad)) for factor in layer.factors("B")] for layer in layers]
    parts = low.split(a.rank + pad, dim=-1)
    return first.side_by_side([multiply(part, [b[number] for b in factors]) for number, part in enumerate(parts)])


def adapted_layers(chunks: Sequence[Any]) -> Iterator[Any]:
    """Every layer with adapters of model chunks."""
    return (module for chunk in chunks for module in chunk.modules() if isinstance(module, Adapted))


def has_adapters(chunk: Any) -> bool:
    """Whether a model chunk has any."""
    return next(adapted_layers([chunk]), None) is not None


def is_adapter(name: str) -> bool:
    """Whether a parameter's name, local or global, is an adapter's."""
    return name.rpartition(".")[2].startswith(PREFIX)


@contextlib.contextmanager
def adapters_off(chunks: Sequence[Any]) -> Iterator[None]:
    """Inside, the model is its base."""
    layers = list(adapted_layers(chunks))
    for layer in layers:
        layer.adapters.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.adapters.enabled = True


@torch.no_grad()
def merge(chunks: Sequence[Any]) -> None:
    """W <- W + scale * B A in every layer with adapters, computed in FP32 at least, and take them off. Each rank merges its own part."""
    for layer in list(adapted_layers(chunks)):
        a, weight = layer.adapters, layer.weight
        exact = torch.promote_types(weight.dtype, torch.float32)
        pairs = zip(layer.factors("A"), layer.factors("B"), strict=True)
        products = [A.to(exact).t() @ B.to(exact).t() for A, B in pairs]  # [in, out] of each part
        weight.copy_(weight.to(exact) + a.scale * layer.side_by_side(products).t())
        for name in [name for name in layer._parameters if name.startswith(PREFIX)]:
            del layer._parameters[name]
        del layer.adapters
        layer.__class__ = type(layer).__mro__[2]

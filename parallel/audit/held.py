"""What a rank holds, tensor by tensor, under keys that are equal exactly where the values must be.

Nothing here reads the flags that the auditor is to check (`sequence_parallel`, `allreduce`, ...): a key is a global name and,
for a tensor cut over tensor-parallel ranks, the number of the cut; layers and experts are told apart by the name itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

REQUIRES_GRAD, IN_BUFFER, COUNTED = 1, 2, 4


@dataclass(frozen=True)
class Held:
    """A parameter or buffer of this rank. key: the same on every rank that holds the same values."""

    name: str
    key: str
    tensor: Tensor
    is_buffer: bool = False


@dataclass(frozen=True)
class Entry:
    """One tensor to compare: `kind` of `held`, or of the elements [start, stop) of it that this rank's optimizer has."""

    kind: str  # weight | buffer | gradient | master | exp_avg | exp_avg_sq
    held: Held
    value: Tensor
    start: int = 0
    stop: int = -1
    flags: int = 0
    part: int = 0  # which of the chained optimizers, for gradients

    @property
    def label(self) -> str:
        """Equal on all ranks whose values can be compared; where copies have another dtype or size, their labels differ."""
        part = "" if self.stop < 0 else f"|{self.start}:{self.stop}"
        return f"{self.kind}|{self.held.key}|{str(self.value.dtype).removeprefix('torch.')}|{self.value.numel()}{part}"


def parts_of(optimizer: Any) -> list[Any]:
    """The optimizers that megatron chains: dense parameters, experts."""
    return [] if optimizer is None else list(getattr(optimizer, "chained_optimizers", [optimizer]))


def weights(held: Sequence[Held], buffered: set[int]) -> Iterator[Entry]:
    """Parameters and persistent buffers as the model computes with them. buffered: ids of parameters that DDP reduces."""
    for h in held:
        flags = REQUIRES_GRAD * h.tensor.requires_grad | IN_BUFFER * (id(h.tensor) in buffered)
        yield Entry("buffer" if h.is_buffer else "weight", h, h.tensor.detach(), flags=flags)


def states(held: Sequence[Held], optimizer: Any) -> Iterator[Entry]:
    """FP32 masters and Adam's moments; of the distributed optimizer the part that this rank keeps."""
    for h, main, start, stop, part, _ in _mains(held, optimizer):
        if main is not h.tensor:
            hosts = getattr(part.optimizer, "hosts", {})  # of an offloaded optimizer, whose masters have no storage on the device
            yield Entry("master", h, hosts.get(id(main), main).detach(), start, stop)
        state = part.optimizer.state.get(main, {})
        for kind in ("exp_avg", "exp_avg_sq"):
            if kind in state:
                yield Entry(kind, h, state[kind], start, stop)


def gradients(held: Sequence[Held], optimizer: Any) -> Iterator[Entry]:
    """Main gradients as the optimizer will use them, and whether its global norm counts each. Before the update."""
    counted = _counted(optimizer)
    for h, main, start, stop, _, number in _mains(held, optimizer):
        gradient = getattr(h.tensor, "main_grad", None)
        if gradient is not None:
            value = gradient.detach().view(-1)[start:stop] if stop >= 0 else gradient.detach()
            yield Entry("gradient", h, value, start, stop, COUNTED * (id(main) in counted), number)


def _mains(held: Sequence[Held], optimizer: Any) -> Iterator[tuple[Held, Any, int, int, Any, int]]:
    """(held, the tensor that the optimizer steps, its first and last element in the parameter or -1, which optimizer, its number)."""
    for number, part in enumerate(parts_of(optimizer)):
        if getattr(part, "is_stub_optimizer", False):
            continue
        order = getattr(part, "model_param_group_index_map", None)
        stepped = {id(p) for group in part.optimizer.param_groups for p in group["params"]}
        for h in held:
            if order is not None:
                if h.tensor in order:
                    group, index = order[h.tensor]
                    where = part._get_model_param_range_map(h.tensor)["param"]
                    yield h, part.optimizer.param_groups[group]["params"][index], where.start, where.end, part, number
            else:
                main = getattr(h.tensor, "main_param", None)
                main = h.tensor if main is None else main
                if id(main) in stepped:
                    yield h, main, 0, -1, part, number


def _counted(optimizer: Any) -> set[int]:
    """Ids of the optimizer's tensors whose gradient its own norm takes: it is asked, after it was handed the gradients."""
    found: set[int] = set()
    for part in parts_of(optimizer):
        if getattr(part, "is_stub_optimizer", False):
            continue
        part.prepare_grads()  # hands over main gradients; step() does it again, to the same effect
        taken = {g.data_ptr() for g in part.get_main_grads_for_grad_norm() if g.numel()}
        for group in part.optimizer.param_groups:
            found |= {id(p) for p in group["params"] if p.grad is not None and p.grad.data_ptr() in taken}
    return found


@torch.no_grad()
def fingerprint(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Two sums of the bits of a tensor modulo 2^64, over rows of a table and over its columns: equal tensors agree on them,
    and no two elements can be exchanged, nor one take from another, without a change in one of the sums."""
    flat = tensor.detach().contiguous().view(-1)
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    bits = flat.view(width).to(torch.int64) if flat.numel() else torch.zeros(1, dtype=torch.int64, device=flat.device)
    whole = len(bits) // _WIDTH * _WIDTH
    table, rest = bits[:whole].view(-1, _WIDTH), bits[whole:]
    rows, columns = table.sum(1), table.sum(0)
    columns[: len(rest)] += rest  # the last row, which may be shorter
    return _mixed(torch.cat([rows, rest.sum()[None]])), _mixed(columns)


_WIDTH = 512


def _mixed(sums: Tensor) -> Tensor:
    odd = torch.arange(1, 2 * len(sums) + 1, 2, dtype=torch.int64, device=sums.device) * 0x9E3779B97F4A7C1
    return (sums * odd).sum()

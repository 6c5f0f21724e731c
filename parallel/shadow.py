"""An exponential moving average of the weights, in FP32 beside the masters.

    v <- d v + (1 - d) w     after every step, from v = w before the first (Polyak & Juditsky 1992 in its forgetting form)

A rank keeps the average of those weights whose masters it owns: with the distributed optimizer its shard, otherwise all.
Checkpoints hold it as whole FP32 weights under `ema.<name>`: any layout opens it, and evaluation and conversion need no
optimizer for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalign.parallel.optimizer import parts_of


@dataclass(frozen=True)
class Owned:
    """A trained parameter with this rank's FP32 master of it."""

    parameter: Any
    master: Tensor
    start: int | None  # where the master begins in the flattened parameter; None: it is whole
    group: Any  # ranks that own the other parts


def owned_by(optimizer: Any) -> Iterator[Owned]:
    """Every parameter of which this rank owns (a part of) the master, with the distributed optimizer or without."""
    for part in parts_of(optimizer):
        if hasattr(part, "model_param_group_index_map"):
            for parameter, (group, order) in part.model_param_group_index_map.items():
                start = part._get_model_param_range_map(parameter)["param"].start
                master = part.optimizer.param_groups[group]["params"][order]
                hosts = getattr(part.optimizer, "hosts", {})  # of an offloaded optimizer
                yield Owned(parameter, hosts.get(id(master), master), start, part.data_parallel_group)
        elif hasattr(part, "fp32_from_float16_groups"):
            for parameters, masters in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
                yield from (Owned(parameter, master, None, None) for parameter, master in zip(parameters, masters, strict=True))
            yield from (Owned(parameter, parameter, None, None) for group in part.fp32_from_fp32_groups for parameter in group)
        else:
            yield from (Owned(parameter, parameter, None, None) for parameter in part.get_parameters())


class Shadow:
    """The average of one model. parameters: those of all chunks of this rank."""

    def __init__(self, optimizer: Any, parameters: Sequence[Any], decay: float):
        """Begin at the weights of this moment. decay: d, between 0 and 1."""
        self.decay = decay
        self.owned = list(owned_by(optimizer))
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.values = [torch.empty_like(entry.master, dtype=torch.float32) for entry in self.owned]
        # Every rank of a group gathers all its parameters, those of which it owns nothing too.
        self.groups = {id(entry.parameter): entry.group for entry in self.owned}
        self.at = {id(entry.parameter): i for i, entry in enumerate(self.owned)}
        for part in parts_of(optimizer):
            for buffer in getattr(part, "buffers", []):
                self.groups.update(dict.fromkeys(map(id, buffer.params), part.data_parallel_group))
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Forget what was averaged; begin again at the weights."""
        for value, entry in zip(self.values, self.owned, strict=True):
            value.copy_(entry.master)

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step."""
        if self.owned:  # of a small model a rank may own nothing
            torch._foreach_lerp_(self.values, [entry.master.detach() for entry in self.owned], 1 - self.decay)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def whole(self, parameter: Any) -> Tensor:
        """The average of a parameter as the rank holds it, FP32 (collective over the ranks that share its master)."""
        index, group = self.at.get(id(parameter)), self.groups[id(parameter)]
        if index is not None and self.owned[index].start is None:
            return self.values[index]
        full = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        if index is not None:
            start = self.owned[index].start or 0
            full[start : start + self.values[index].numel()] = self.values[index].to(full.device)
        dist.all_reduce(full, group=group)
        return full.view(parameter.shape)

    @torch.no_grad()
    def set_whole(self, parameter: Any, full: Tensor) -> None:
        """Take this rank's part of `full`."""
        index = self.at.get(id(parameter))
        if index is not None:
            start, value = self.owned[index].start, self.values[index]
            value.copy_(full if start is None else full.flatten()[start : start + value.numel()])

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model has the average for its weights (rounded to their dtype); after it, its own, bit for bit (collective)."""
        own = [parameter.detach().clone() for parameter in self.parameters]
        averages = (self.whole(parameter) for parameter in self.parameters)
        with torch.no_grad():
            for parameter, average in zip(self.parameters, averages, strict=True):
                # Without the distributed optimizer FP32 weights are their own masters, and `average` is no view of them.
                parameter.copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.parameters, own, strict=True):
                    parameter.copy_(value)


def sharded_average(shadow: Shadow, model_state: dict[str, Any], *, loading: bool) -> dict[str, Any]:
    """`ema.<name>` of every trained parameter of a chunk's sharded state dict (collective)."""
    return _under_ema(model_state, shadow.groups, lambda parameter: shadow.whole(parameter) if not loading else torch.empty_like(parameter, dtype=torch.float32))


def requested_average(model_state: dict[str, Any], stored: set[str]) -> dict[str, Any]:
    """Those that a checkpoint has (`stored`: its keys), to be loaded in the place of weights."""
    wanted = {id(entry.data): None for entry in _parameters(model_state).values() if f"ema.{entry.key}" in stored}
    return _under_ema(model_state, wanted, lambda parameter: torch.empty_like(parameter, dtype=torch.float32))


def _under_ema(model_state: dict[str, Any], wanted: dict[int, Any], value: Any) -> dict[str, Any]:
    from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

    chosen = {name: entry for name, entry in _parameters(model_state).items() if id(entry.data) in wanted}
    return {name: make_sharded_optimizer_tensor(entry, value(entry.data), "ema") for name, entry in chosen.items()}


def _parameters(model_state: dict[str, Any]) -> dict[str, Any]:
    return {name: entry for name, entry in model_state.items() if isinstance(getattr(entry, "data", None), torch.nn.Parameter)}

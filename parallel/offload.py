"""Masters and Adam moments in host memory: 12 bytes a BF16 parameter leave the device, for a trip of 8 a step.

    a step    gradients (clipped on the device)  -> host, AdamW there, masters -> rounded into the model's weights

megatron-core offers HybridDeviceOptimizer, which leaves what is not on CUDA alone (hybrid_optimizer.py) and wants a
precision-aware optimizer of Transformer Engine. This wrapper stands in the place of torch's AdamW inside megatron's
distributed optimizer instead. The same lines run where the device is the CPU: there the trip is a copy, and every number
can be compared. On the device a master stays as a shape without storage, so that megatron can hang gradients on it.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor

from megalign.parallel.optimizer import parts_of


class HostAdamW:
    """Torch's AdamW over host copies of an inner optimizer's parameters; megatron sees the device's side of it.

    param_groups: the device's parameters, with the hyperparameters that a step uses. state: of each of them, on the host.
    """

    def __init__(self, inner: Any, freed: set[int]):
        """inner: an AdamW (torch's, or a fused one) that has made no step. freed: ids of its parameters whose device storage is given up."""
        self.param_groups: list[dict[str, Any]] = inner.param_groups
        self.defaults = inner.defaults
        pin = torch.cuda.is_available()
        self.hosts: dict[int, Tensor] = {}
        groups = []
        for group in self.param_groups:
            for parameter in group["params"]:
                host = parameter.detach().to("cpu", copy=True)
                self.hosts[id(parameter)] = torch.nn.Parameter(host.pin_memory() if pin else host)
                if id(parameter) in freed:
                    parameter.untyped_storage().resize_(0)
            groups.append({**group, "params": [self.hosts[id(parameter)] for parameter in group["params"]]})
        self.freed = freed
        self.inner = torch.optim.AdamW(groups)
        self.state = _HostState(self)

    def parameters(self) -> Iterator[Any]:
        """On the device's side."""
        return (parameter for group in self.param_groups for parameter in group["params"])

    @torch.no_grad()
    def step(self) -> None:
        """One step of AdamW from the gradients that hang on the device's parameters."""
        self._tell_groups()
        for parameter in self.parameters():
            host = self.hosts[id(parameter)]
            host.grad = None if parameter.grad is None else parameter.grad.to("cpu", torch.float32, copy=True, non_blocking=host.is_pinned())
            parameter.grad = None
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        self.inner.step()
        for host in self.hosts.values():
            host.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.parameters():
            parameter.grad = None

    def add_param_group(self, group: dict[str, Any]) -> None:
        raise RuntimeError("an offloaded optimizer takes no further parameters; make it anew")

    def state_dict(self) -> dict[str, Any]:
        self._tell_groups()
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)
        for group, own in zip(self.inner.param_groups, self.param_groups, strict=True):
            own.update({key: value for key, value in group.items() if key != "params"})

    def _tell_groups(self) -> None:
        """Learning rate and the like, which are set on the device's side."""
        for group, own in zip(self.inner.param_groups, self.param_groups, strict=True):
            group.update({key: value for key, value in own.items() if key != "params"})

    def bytes(self) -> dict[str, int]:
        """What masters, moments and their like take on each side."""
        host = [*self.hosts.values(), *(value for state in self.inner.state.values() for value in state.values() if value.dim())]
        return {
            "device": sum(parameter.untyped_storage().nbytes() for parameter in self.parameters() if id(parameter) in self.freed),
            "host": sum(tensor.numel() * tensor.element_size() for tensor in host),
        }


class _HostState(MutableMapping[Any, dict[str, Tensor]]):
    """State by the device's parameter; what is put in goes to the host."""

    def __init__(self, optimizer: HostAdamW):
        self.optimizer = optimizer

    def __getitem__(self, parameter: Any) -> dict[str, Tensor]:
        return self.optimizer.inner.state[self.optimizer.hosts[id(parameter)]]

    def __setitem__(self, parameter: Any, state: dict[str, Tensor]) -> None:
        self.optimizer.inner.state[self.optimizer.hosts[id(parameter)]] = {name: value.to("cpu") for name, value in state.items()}

    def __delitem__(self, parameter: Any) -> None:
        del self.optimizer.inner.state[self.optimizer.hosts[id(parameter)]]

    def __iter__(self) -> Iterator[Any]:
        return (parameter for parameter in self.optimizer.parameters() if self.optimizer.hosts[id(parameter)] in self.optimizer.inner.state)

    def __len__(self) -> int:
        return len(self.optimizer.inner.state)


def offload(optimizer: Any) -> None:
    """Move masters and moments of megatron's distributed optimizer to the host, before its first step.

    Raises RuntimeError for another kind of optimizer: without the distributed one every rank would step all parameters
    on its few host cores.
    """
    for part in parts_of(optimizer):
        if not hasattr(part, "shard_fp32_from_float16_groups"):
            raise RuntimeError("optimizer.optimizer_cpu_offload needs parallel.use_distributed_optimizer")
        masters = {id(master) for group in part.shard_fp32_from_float16_groups for master in group}  # the others are the weights themselves
        part.optimizer = HostAdamW(part.optimizer, masters)
        _stand_in(part, part.optimizer)


def _stand_in(part: Any, host: HostAdamW) -> None:
    """Wherever megatron reads or writes a master, it finds the host's."""

    def with_hosts(name: str) -> None:
        upstream = getattr(part, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            names = ("shard_fp32_from_float16_groups", "shard_fp32_groups")
            kept = {groups: getattr(part, groups) for groups in names}
            for groups in names:
                setattr(part, groups, [[host.hosts[id(master)] for master in group] for group in kept[groups]])
            try:
                return upstream(*args, **kwargs)
            finally:
                for groups in names:
                    setattr(part, groups, kept[groups])

        setattr(part, name, call)

    with_hosts("_copy_main_params_to_model_params")
    with_hosts("_copy_model_params_to_main_params")

    def master_of(model_param: Any) -> Any:
        group, order = part.model_param_group_index_map[model_param]
        return part.optimizer.param_groups[group]["params"][order]

    def get_states(model_param: Any) -> dict[str, Tensor]:
        master = master_of(model_param)
        return {"param": host.hosts[id(master)], **host.state[master]}

    @torch.no_grad()
    def set_states(model_param: Any, tensors: dict[str, Tensor]) -> None:
        for name, value in get_states(model_param).items():
            if name != "step":  # restored from the parameter groups
                value.copy_(tensors[name])

    part._get_main_param_and_optimizer_states = get_states
    part._set_main_param_and_optimizer_states = set_states

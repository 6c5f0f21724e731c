"""AdamW with FP32 master weights for BF16 parameters, and moments in BF16 or FP32.

    m = beta1 m + (1 - beta1) g            g = gradient * gradient_scale
    v = beta2 v + (1 - beta2) g^2
    w = w (1 - lr * decay) - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

w is the FP32 master; the parameter becomes its nearest BF16, and where the parameter belongs to an FP8 layer, its FP8
bytes, their transpose and the tile scales are written in the same pass (Loshchilov & Hutter, arXiv:1711.05101; low-precision
moments as in DeepSeek-V3, arXiv:2412.19437 section 3.3). All of it is FP32 arithmetic in this order, nothing fused into
multiply-adds, so that `adamw_triton.py` gives the same bits.

Why masters: a BF16 weight of 0.02 has neighbours 1.2e-4 away; an update of 1e-7 never moves it.
Why not BF16 round-to-nearest for v with beta2 = .999: v moves by a thousandth a step, half a BF16 step is two
thousandths: once gradients shrink, v stays where it was (measured: 8 times too large after gradients fell tenfold, so steps
are 3 times too small). Stochastic rounding keeps the mean right at the same two bytes; FP32 is exact at four.

Bytes a parameter and step: 4+4 master, 2+2 a moment in BF16, 2 gradient, 2 parameter; FP8 adds 1+1.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megalign.kernels.backends import quantise_blocks_both
from megalign.kernels.rounding import Place, noise_key, philox, stochastic_bf16

CHUNK = 2**16  # elements updated at a time on CPU: what stays in cache


@dataclass(frozen=True)
class Step:
    """The numbers of one step of one parameter, as the arithmetic uses them."""

    beta1: float
    beta2: float
    eps: float
    decay: float  # 1 - lr * weight_decay
    size: float  # lr / (1 - beta1^t)
    root_correction: float  # 1 / sqrt(1 - beta2^t)
    number: int  # t, from 1
    key: int  # of the rounding noise
    stochastic: bool

    @classmethod
    def of(cls, group: dict[str, Any], number: int, key: int) -> Step:
        beta1, beta2 = group["betas"]
        return cls(
            beta1, beta2, group["eps"], 1 - group["lr"] * group["weight_decay"], group["lr"] / (1 - beta1**number),
            1 / math.sqrt(1 - beta2**number), number, key, group["rounding"] == "stochastic",
        )  # fmt: skip


class MixedPrecisionAdamW(torch.optim.Optimizer):
    """AdamW over parameters of any float type; FP32 masters where the parameter is not FP32 itself.

    first_moment, second_moment: torch.bfloat16 or torch.float32, whatever the parameters are. rounding: of BF16 moments,
    "stochastic" or "nearest". seed: of the stochastic rounding. backend: "auto" (Triton on CUDA), "torch" or "triton".

    Pass `model.named_parameters()`: the noise of a parameter then depends on its name, not on its position, so that every
    pipeline stage draws what one process would. A shard of a larger parameter says which with `parameter.place = Place(...)`.

    state_dict() holds the masters and moments in their own types and load_state_dict() returns them bit for bit.
    Raises ValueError for BF16 round-to-nearest second moments with beta2 > .99, sparse gradients, parameters that are not
    contiguous, and states of another type than asked for.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        first_moment: torch.dtype = torch.bfloat16,
        second_moment: torch.dtype = torch.bfloat16,
        rounding: str = "stochastic",
        seed: int = 0,
        backend: str = "auto",
    ):
        self.backend = _one_of("backend", backend, ("auto", "torch", "triton"))
        names = ("first_moment", "second_moment", "rounding")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "seed": seed, **dict(zip(names, (first_moment, second_moment, rounding)))})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, gradient_scale: Tensor | float = 1.0) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step. gradient_scale multiplies every gradient: a clipping coefficient; as a tensor it costs no synchronisation."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for parameter, group, name in self._parameters():
            gradient = parameter.grad
            if gradient is None or getattr(parameter, "grad_added_to_main_grad", False):  # then .grad is an empty placeholder
                gradient = getattr(parameter, "main_grad", None)
            if gradient is None:
                continue
            if gradient.is_sparse:
                raise ValueError(f"{name} has a sparse gradient; MixedPrecisionAdamW needs dense ones: set sparse=False on its embedding")
            state = self._state(parameter, group, name)
            state["step"] += 1
            step = Step.of(group, int(state["step"]), noise_key(group["seed"], name))
            scale = torch.as_tensor(gradient_scale, dtype=torch.float32, device=parameter.device)
            update = self._backend(parameter)
            update(parameter, gradient.contiguous(), state, step, scale, getattr(parameter, "place", Place()))
            if hasattr(parameter, "fp8_weight"):
                parameter.fp8_weight.written(parameter)  # pyright: ignore[reportAttributeAccessIssue]
        return loss

    def master(self, parameter: Tensor) -> Tensor:
        """The FP32 weight behind `parameter`: itself if it is FP32."""
        return self.state[parameter].get("master", parameter)

    @torch.no_grad()
    def create_states(self) -> None:
        """Make every state now instead of at the first step: a loader of checkpoints needs something to load into."""
        for parameter, group, name in self._parameters():
            self._state(parameter, group, name)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, except that no state changes its type (torch's casts every one to that of the parameter)."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"]):
            for name in ("first_moment", "second_moment"):
                if saved.get(name) != group[name]:
                    raise ValueError(f"{name} is {saved.get(name)} in the checkpoint, but this optimizer keeps {group[name]}; construct it with the types it was saved with")
            _check_group({**group, **saved})
        super().load_state_dict({**state_dict, "state": {}})
        saved_order = [key for group in state_dict["param_groups"] for key in group["params"]]
        for key, (parameter, group, name) in zip(saved_order, self._parameters()):
            if key in state_dict["state"]:
                entries = state_dict["state"][key]
                for entry, dtype in _state_types(parameter, group).items():
                    found = (entries[entry].dtype, tuple(entries[entry].shape)) if entry in entries else "missing"
                    if found != (dtype, tuple(parameter.shape)):
                        raise ValueError(f"state {entry!r} of {name} is {found} in the checkpoint; this parameter needs {(dtype, tuple(parameter.shape))}")
                self.state[parameter] = {k: v.clone() if k == "step" else v.to(parameter.device, copy=True) for k, v in entries.items()}

    def _parameters(self) -> Iterable[tuple[Tensor, dict[str, Any], str]]:
        count = 0
        for group in self.param_groups:
            for i, parameter in enumerate(group["params"]):
                yield parameter, group, group["param_names"][i] if "param_names" in group else f"parameter {count}"
                count += 1

    def _state(self, parameter: Tensor, group: dict[str, Any], name: str) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            if not parameter.is_contiguous():
                raise ValueError(f"{name} has strides {parameter.stride()} for shape {tuple(parameter.shape)}; MixedPrecisionAdamW needs contiguous parameters: call .contiguous() before it is made")
            state["step"] = torch.tensor(0.0)
            for entry, dtype in _state_types(parameter, group).items():
                state[entry] = parameter.detach().to(dtype, copy=True) if entry == "master" else torch.zeros_like(parameter, dtype=dtype)
        return state

    def _backend(self, parameter: Tensor) -> Callable[..., None]:
        available = parameter.is_cuda and importlib.util.find_spec("triton") is not None
        if self.backend == "torch" or (self.backend == "auto" and not available):
            return update_torch
        from megalign.kernels.adamw_triton import update_triton

        return update_triton


def update_torch(parameter: Tensor, gradient: Tensor, state: dict[str, Any], step: Step, scale: Tensor, place: Place) -> None:
    """One step of one parameter, in place; the oracle of `update_triton`."""
    flat = [t.view(-1) for t in (state.get("master", parameter), state["exp_avg"], state["exp_avg_sq"], gradient, parameter)]
    size = CHUNK if parameter.device.type == "cpu" else max(1, parameter.numel())
    for first in range(0, parameter.numel(), size):
        w, m, v, g, p = (t[first : first + size] for t in flat)
        noise = (None, None)
        if step.stochastic and torch.bfloat16 in (m.dtype, v.dtype):
            noise = philox(place.of(first, len(p), p.device), step.number, step.key)
        g = g.float() * scale
        new_m = m.float() * step.beta1 + g * (1 - step.beta1)
        new_v = v.float() * step.beta2 + g * g * (1 - step.beta2)
        denominator = _root(new_v) * step.root_correction + step.eps
        w.copy_(w * step.decay - new_m / denominator * step.size)
        for kept, new, bits in zip((m, v), (new_m, new_v), noise):
            kept.copy_(stochastic_bf16(new, bits) if bits is not None and kept.dtype == torch.bfloat16 else new)
        if p.dtype != torch.float32:  # else the parameter is its own master
            p.copy_(w)
    if hasattr(parameter, "fp8_weight"):
        parameter.fp8_weight.replace(parameter, quantise_blocks_both(parameter.detach()))  # pyright: ignore[reportAttributeAccessIssue]


def _root(x: Tensor) -> Tensor:
    """Square root, correctly rounded: torch's on CPU is off by one unit in the last place for a fifth of FP32 numbers."""
    return x.double().sqrt().float() if x.device.type == "cpu" else x.sqrt()


def _state_types(parameter: Tensor, group: dict[str, Any]) -> dict[str, torch.dtype]:
    types = {"exp_avg": group["first_moment"], "exp_avg_sq": group["second_moment"]}
    return types if parameter.dtype == torch.float32 else {"master": torch.float32, **types}


def _check_group(group: dict[str, Any]) -> None:
    _one_of("rounding", group["rounding"], ("stochastic", "nearest"))
    for name in ("first_moment", "second_moment"):
        _one_of(name, group[name], (torch.bfloat16, torch.float32))
    for name, low in (("lr", 0.0), ("eps", 0.0), ("weight_decay", 0.0)):
        if not group[name] >= low:
            raise ValueError(f"{name} = {group[name]}; it must be at least {low}")
    for i, beta in enumerate(group["betas"], 1):
        if not 0 <= beta < 1:
            raise ValueError(f"beta{i} = {beta}; it must be at least 0 and below 1")
    if group["second_moment"] == torch.bfloat16 and group["rounding"] == "nearest" and group["betas"][1] > 0.99:
        raise ValueError(
            f"beta2 = {group['betas'][1]} with BF16 second moments rounded to nearest: a step changes the moment by at most "
            f"{1 - group['betas'][1]:.2g} of itself once gradients shrink, and BF16 drops changes below 2^-9 = 0.002, so it stays "
            "several times too large; set rounding='stochastic', second_moment=torch.float32, or beta2 <= .99"
        )


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    if value not in allowed:
        raise ValueError(f"{name} = {value!r}; it must be one of {', '.join(map(repr, allowed))}")
    return value

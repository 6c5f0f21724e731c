"""The experts of a layer as two grouped matmuls of torch, in place of one MLP after the other.

    hidden_TF = x_TD @ fc1[e]'      for the rows of each expert e: T rows sorted by expert
    out_TD    = probs_T * act(hidden_TF) @ fc2[e]'

Weights stay one parameter an expert and projection, under SequentialMLP's names: checkpoints, weight tables and
optimizer states do not know the difference. A pass stacks them into the [E, out, in] that the kernel wants, and the
backward pass stacks them again instead of keeping the copy: 2 bytes read and written a weight, beside 2 T / E
multiplications of it.

# T rows, D hidden size, F rows of a projection on this rank (gate and up), E experts of this rank
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megalign.kernels.elementwise import swiglu
from megalign.parallel.lora import grouped_delta

# torch 2.10 made it public; 2.9 has the private one.
grouped_mm: Any = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


class _ColumnWeight(ColumnParallelLinear):
    def forward(self) -> Any:  # pyright: ignore
        """The weight. A call, so that what waits at a module's door (DDP's overlapped gather of weights) is woken."""
        return self.weight


class _RowWeight(RowParallelLinear):
    def forward(self) -> Any:  # pyright: ignore
        return self.weight


class GroupedExperts(SequentialMLP):
    """SequentialMLP's experts, computed together. Any expert may have no rows, and a rank none at all."""

    def forward(self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor) -> tuple[Tensor, None]:
        """x [T, D] sorted by expert, rows of each expert [E], probabilities [T] -> [T, D] (partial over expert-tensor ranks)."""
        x, config = permuted_local_hidden_states, self.config
        experts: Any = self.local_experts
        ends = torch.as_tensor(tokens_per_expert, device=x.device).cumsum(0).to(torch.int32)
        inner = _project(x, ends, [expert.linear_fc1 for expert in experts])
        if config.gated_linear_unit and config.activation_func is F.silu:
            inner = swiglu(inner)
        elif config.gated_linear_unit:
            gate, up = inner.chunk(2, dim=-1)
            inner = config.activation_func(gate) * up
        else:
            inner = config.activation_func(inner)
        inner = (inner * permuted_probs.unsqueeze(-1)).to(x.dtype)
        return _project(inner, ends, [expert.linear_fc2 for expert in experts]), None


def _project(x: Tensor, ends: Tensor, layers: list[Any]) -> Tensor:
    """One projection of every expert, with its adapters where it has some."""
    out: Any = _GroupedLinear.apply(x, ends, *(layer() for layer in layers))
    adapters = getattr(layers[0], "adapters", None)
    if adapters is None or not adapters.enabled:
        return out
    return out + grouped_delta(layers, x, lambda rows, weights: _GroupedLinear.apply(rows, ends, *weights))  # pyright: ignore


class _GroupedLinear(torch.autograd.Function):
    """x[rows of e] @ weight[e]' for every e, row after row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ends: Tensor, *weights: Tensor) -> Tensor:  # pyright: ignore
        ctx.save_for_backward(x, ends, *weights)
        if len(x) == 0:
            return x.new_empty(0, weights[0].shape[0])
        return grouped_mm(x.contiguous(), torch.stack(weights).transpose(-2, -1), offs=ends)

    @staticmethod
    def backward(ctx: Any, grad_TF: Tensor) -> Any:  # pyright: ignore
        x, ends, *weights = ctx.saved_tensors
        if len(x) == 0:
            return torch.zeros_like(x), None, *(torch.zeros_like(weight) for weight in weights)
        grad_TF = grad_TF.contiguous()
        grad_x = grouped_mm(grad_TF, torch.stack(weights), offs=ends) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[2:]):
            return grad_x, None, *(None for _ in weights)
        grads_EFD = grouped_mm(grad_TF.t(), x, offs=ends)
        # A group without rows is a sum over nothing, which not every kernel writes.
        empty = torch.diff(ends, prepend=ends.new_zeros(1)) == 0
        return grad_x, None, *grads_EFD.masked_fill_(empty[:, None, None], 0.0).unbind()


def experts_spec(grouped: bool, one: MLPSubmodules) -> ModuleSpec:
    """Experts of both kinds; their parameters have the same names, shapes and attributes. one: the parts of an expert alone."""
    if grouped:
        # The activation is for whoever computes them one by one after all: the probe, in FP64.
        return ModuleSpec(module=GroupedExperts, submodules=MLPSubmodules(linear_fc1=_ColumnWeight, linear_fc2=_RowWeight, activation_func=one.activation_func))
    return ModuleSpec(module=SequentialMLP, submodules=one)


def use_grouped(wanted: bool | None, device: str, dtype: torch.dtype, hidden_size: int, width: int) -> bool:
    """Whether to compute experts together: as the recipe says, or (None) on CUDA where the kernel takes these sizes.

    On a CPU torch's operation is a loop over the groups, no faster than SequentialMLP. width: of an expert on this rank.
    Raises RuntimeError where it is asked for and cannot be had.
    """
    if wanted is False or (wanted is None and device != "cuda"):
        return False
    if _works(device, dtype, hidden_size, width):
        return True
    if wanted:
        raise RuntimeError(
            f"model.moe_grouped_gemm=true: torch {torch.__version__} has no grouped matmul for {dtype} on {device} with rows of {hidden_size} and {width}; "
            "rows must be multiples of 16 bytes; leave it null, or set it to false"
        )
    return False


@lru_cache
def _works(device: str, dtype: torch.dtype, hidden_size: int, width: int) -> bool:
    """By trying: versions of torch differ in the dtypes, devices and alignments that they take."""
    if grouped_mm is None:
        return False
    try:
        x = torch.ones(3, hidden_size, device=device, dtype=dtype, requires_grad=True)
        weights = [torch.ones(width, hidden_size, device=device, dtype=dtype, requires_grad=True) for _ in range(2)]
        out: Any = _GroupedLinear.apply(x, torch.tensor([3, 3], device=device, dtype=torch.int32), *weights)
        out.sum().backward()
        return bool(out[0, 0] == hidden_size) and all(weight.grad is not None for weight in weights)
    except (RuntimeError, NotImplementedError, TypeError):
        return False

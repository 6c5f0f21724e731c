"""SwiGLU, RMSNorm and rotary positions, each with its own backward, in plain torch operations.

Around the matmuls a layer is bound by memory. Left to autograd, these three copy more than they compute: a gradient
of halves is joined by `cat`, half a rotation is built by `neg` and `cat`, a norm is six operations each way, and every
intermediate is kept until backward. Here each writes its result where it belongs and keeps only its inputs:

    swiglu      silu(gate) * up                       keeps [gate, up]; silu is computed again
    rms_norm    x / rms(x) * weight                   keeps x and 1 / rms(x)
    rotate      (x1 c - x2 s, x2 c + x1 s)            keeps c and s; backward is the rotation by the opposite angle

The references they are tested against are the formulas, differentiated by autograd in float64.

# ... any leading axes, D normalised size, F width of an MLP, K head size
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202, eq. 6): [..., 2F], gate first -> [..., F]."""
    return _SwiGLU.apply(gate_up)  # pyright: ignore[reportReturnType]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019, eq. 4) over the last axis: [..., D], [D] -> [..., D]."""
    return _RMSNorm.apply(x, weight, eps)  # pyright: ignore[reportReturnType]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (x[i], x[i + K/2]) turned by an angle (Su et al. 2021, arXiv:2104.09864, eq. 34): [..., K] -> [..., K].

    cos, sin: [..., K/2], broadcastable to half of x; they take no gradient.
    """
    return _Rotate.apply(x, cos, sin)  # pyright: ignore[reportReturnType]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        both = torch.empty_like(gate_up)
        grad_gate, grad_up = both.chunk(2, -1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return both


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_wide(x))
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, inverse = ctx.saved_tensors
        return *rms_norm_gradients(grad, x, weight, inverse), None


def rms_norm_gradients(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """(dx [..., D], dweight [D]) of rms_norm from its upstream, its inputs and inverse = 1 / rms(x) [..., 1]."""
    normed = x * inverse
    grad_weight = (grad * normed).reshape(-1, x.shape[-1]).sum(0)
    # d x = (g w - normed mean(g w normed)) / rms
    grad_normed = grad * weight.to(inverse.dtype)
    mean = torch.linalg.vecdot(grad_normed, normed).div_(x.shape[-1]).unsqueeze(-1)
    return grad_normed.addcmul_(normed, mean, value=-1).mul_(inverse).to(x.dtype), grad_weight.to(weight.dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _turned(grad, *ctx.saved_tensors, -1), None, None  # pyright: ignore[reportCallIssue]  cos and sin


def _turned(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    first, second = x.chunk(2, -1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out_first, out_second = out.chunk(2, -1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin, value=direction)
    return out


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32

"""A gated MLP with its norm in FP8: what lies between the matmuls is written in FP8 alone.

    n = rms_norm(x) gamma       h = n W1^T  [gate, up]       a = silu(gate) up       y = a W2^T

    forward    x -> FP8 n, n^T -> BF16 h -> FP8 a, a^T -> BF16 y
    backward   da = dy W2      dW2 = dy^T a      dh in FP8, dh and dh^T, from h and da      dn = dh W1      dW1 = dh^T n      dx, dgamma

The numbers are those of layers one after the other (`elementwise.rms_norm`, Fp8Linear, `elementwise.swiglu` in FP32, Fp8Linear): n, a
and dh are computed in FP32 and rounded to the type of x before they are quantised, but never written in it. That leaves out 4 bytes an element of n
and a in forward and of dh in backward: for 4,096 -> 2 x 14,336 -> 4,096 that is 188 KB a token.
Kept for backward: x and 1 / rms, n^T and a^T in FP8 (1 byte an element), h.

# T tokens, K width, F inner width, a multiple of 128
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megalign.kernels import backends as fp8
from megalign.kernels.elementwise import rms_norm_gradients
from megalign.kernels.linear import DTYPES, Fp8Linear, check_unchanged, uncompiled, weight_gradient
from megalign.kernels.tiles import Fp8Error, Fp8Tensor
from megalign.kernels.weight import Fp8Weight


@uncompiled
def fp8_mlp(x: Tensor, gamma: Tensor, w1: Tensor, w2: Tensor, eps: float = 1e-5, *, gradient_accumulation_fusion: bool = False) -> Tensor:
    """(silu(gate) up) W2^T, [gate, up] = rms_norm(x) W1^T: x [..., K], gamma [K], w1 [2F, K], w2 [N, F] -> [..., N].

    x and weights: bfloat16 or float32. gradient_accumulation_fusion: as fp8_linear's, for both weights. Not twice differentiable.
    Raises Fp8Error for other types and for shapes that do not fit.
    """
    fits = x.dim() and w1.dim() == w2.dim() == 2 and x.shape[-1:] == gamma.shape == w1.shape[1:] and w1.shape[0] == 2 * w2.shape[1]
    if not fits:
        raise Fp8Error(f"fp8_mlp: x {tuple(x.shape)}, gamma {tuple(gamma.shape)}, w1 {tuple(w1.shape)} and w2 {tuple(w2.shape)}; they must be [..., K], [K], [2F, K] and [N, F]")
    if not all(t.dtype in DTYPES and t.device == x.device for t in (x, gamma, w1, w2)):
        raise Fp8Error(f"fp8_mlp: {', '.join(f'{t.dtype} on {t.device}' for t in (x, gamma, w1, w2))}; give bfloat16 or float32, all on one device")
    y: Any = _MLP.apply(x.reshape(-1, x.shape[-1]), gamma, w1, w2, eps, gradient_accumulation_fusion)
    return y.view(*x.shape[:-1], w2.shape[0])


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, w1: Tensor, w2: Tensor, eps: float, fused: bool) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        holders = [Fp8Weight.of(w) for w in (w1, w2)]
        (first, first_t), (second, second_t) = (holder.current(w) for holder, w in zip(holders, (w1, w2)))
        n, n_t, inverse_rms = fp8.rms_norm_quantise(x, gamma, eps)
        h = fp8.matmul(n, first, x.dtype)
        a, a_t = fp8.swiglu_quantise(h)
        ctx.save_for_backward(x, gamma, inverse_rms, h, n_t.data, n_t.scale, a_t.data, a_t.scale)
        ctx.transposed, ctx.held = (first_t, second_t), [(holder, holder.made_from) for holder in holders]
        ctx.weights, ctx.fused = (w1, w2), fused
        return fp8.matmul(a, second, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        check_unchanged(ctx.held)
        x, gamma, inverse_rms, h, *stored = ctx.saved_tensors
        n_t, a_t = (Fp8Tensor(data, scale, len(x), "rows") for data, scale in (stored[:2], stored[2:]))
        (w1, w2), (first_t, second_t) = ctx.weights, ctx.transposed
        wanted = ctx.needs_input_grad
        dy_rows, dy_t = fp8.quantise_rows_both(dy)
        dw2 = weight_gradient(dy_t, a_t, None, w2, ctx.fused) if wanted[3] else None
        dh, dh_t = fp8.swiglu_quantise_backward(h, fp8.matmul(dy_rows, second_t, x.dtype))
        dw1 = weight_gradient(dh_t, n_t, None, w1, ctx.fused) if wanted[2] else None
        if not (wanted[0] or wanted[1]):
            return None, None, dw1, dw2, None, None
        dx, dgamma = rms_norm_gradients(fp8.matmul(dh, first_t, x.dtype), x, gamma, inverse_rms.unsqueeze(-1))
        return dx, dgamma, dw1, dw2, None, None


class Fp8MLP(nn.Module):
    """RMSNorm and a SwiGLU MLP in one FP8 layer: [..., K] -> [..., K], inner width F, a multiple of 128."""

    def __init__(
        self, hidden: int, inner: int, eps: float = 1e-5, device: Any = None, dtype: torch.dtype = torch.bfloat16, *, gradient_accumulation_fusion: bool = False
    ):
        super().__init__()
        self.eps, self.gradient_accumulation_fusion = eps, gradient_accumulation_fusion
        self.norm = nn.Parameter(torch.ones(hidden, device=device, dtype=dtype))
        self.gate_up = Fp8Linear(hidden, 2 * inner, bias=False, device=device, dtype=dtype)
        self.down = Fp8Linear(inner, hidden, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return fp8_mlp(x, self.norm, self.gate_up.weight, self.down.weight, self.eps, gradient_accumulation_fusion=self.gradient_accumulation_fusion)

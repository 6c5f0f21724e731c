"""Quantisation fused with what comes before it, in plain torch: the reference of `fused_triton.py`.

    rms_norm_quantise         y  = x / sqrt(mean(x^2) + eps) * gamma           read x twice, write 2 bytes an element
    swiglu_quantise           a  = silu(gate) * up,  h = [gate, up]            read h, write 2 bytes an element of a
    swiglu_quantise_backward  dh = [da * up * s (1 + gate (1 - s)), da * silu(gate)],  s = sigmoid(gate)

Each returns the two FP8 layouts that the matmuls after it want (rows, and the transpose in rows); the BF16 result in between
is never written. It is still rounded to the input's type before it is quantised, so that fused and unfused agree: FP8 of the
BF16 number, not of the FP32 one. Unfused, that number would be written and read once more: 4 bytes an element on top.

# M tokens, K hidden size, F width of the MLP
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalign.kernels.reference import check_input, quantise_rows_both
from megalign.kernels.tiles import TILE, Fp8Error, Fp8Tensor


def rms_norm_quantise(x: Tensor, gamma: Tensor, eps: float = 1e-5) -> tuple[Fp8Tensor, Fp8Tensor, Tensor]:
    """(y [M, K], y^T [K, M], 1 / rms [M] FP32 for backward) of x [M, K] and gamma [K]. Zhang & Sennrich, arXiv:1910.07467."""
    check_norm(x, gamma)
    wide = x.float()
    mean = wide.square().mean(-1)
    # Where the squares overflow, 1 / rms is 0 and would turn the whole row into zeros: it is marked instead.
    inverse_rms = torch.where(mean.isfinite(), torch.rsqrt(mean + eps), torch.nan)
    y = (wide * inverse_rms[:, None] * gamma.float()).to(x.dtype)
    return *quantise_rows_both(y), inverse_rms


def swiglu_quantise(h: Tensor) -> tuple[Fp8Tensor, Fp8Tensor]:
    """(a [M, F], a^T [F, M]) of h [M, 2F]. Shazeer, arXiv:2002.05202."""
    check_swiglu(h)
    gate, up = h.float().chunk(2, -1)
    return quantise_rows_both((gate * gate.sigmoid() * up).to(h.dtype))


def swiglu_quantise_backward(h: Tensor, da: Tensor) -> tuple[Fp8Tensor, Fp8Tensor]:
    """(dh [M, 2F], dh^T [2F, M]) of h [M, 2F] and da [M, F]: what dgrad and wgrad of the layer before read."""
    check_swiglu(h, da)
    gate, up = h.float().chunk(2, -1)
    s, da = gate.sigmoid(), da.float()
    dgate, dup = da * up * s * (1 + gate * (1 - s)), da * (gate * s)
    return quantise_rows_both(torch.cat([dgate, dup], -1).to(h.dtype))


def check_norm(x: Tensor, gamma: Tensor) -> None:
    check_input(x, (2,))
    if gamma.shape != x.shape[1:] or not gamma.is_floating_point() or gamma.device != x.device:
        raise Fp8Error(f"rms_norm_quantise: x is {tuple(x.shape)} on {x.device} and gamma {gamma.dtype} {tuple(gamma.shape)} on {gamma.device}; they must be floats [M, K] and [K] on one device")


def check_swiglu(h: Tensor, da: Tensor | None = None) -> None:
    check_input(h, (2,))
    if h.shape[1] % (2 * TILE):
        raise Fp8Error(f"swiglu_quantise: h is {tuple(h.shape)}; it must be [M, 2F] with F a multiple of {TILE}, for gate and up to share no tile")
    if da is not None:
        check_input(da, (2,))
        if da.shape != (h.shape[0], h.shape[1] // 2) or da.device != h.device:
            raise Fp8Error(f"swiglu_quantise_backward: da is {tuple(da.shape)} on {da.device} for h {tuple(h.shape)} on {h.device}; it must be [M, F] on the same device")

"""FP8 matmuls through torch's own block-wise scaling: cuBLASLt on Hopper, CUDA 12.9 and later.

    matmul   1 x 128 by 128 x 128       wgrad   1 x 128 by 1 x 128, both with FP32 sums

torch._scaled_mm tells the recipe from the shapes and strides of the scales, which are ours, seen from the other side
(PyTorch, aten/src/ATen/native/cuda/ScaledBlas.cpp, torch 2.9 to 2.13):

    1 x 128     (rows, K/128) with strides (1, rows)           our [K/128, rows], transposed
    128 x 128   (N/128, K/128) with strides (K/128, 1)         ours; of the second operand transposed

For 128 x 128 some versions want the row stride rounded up to 4 and others do not, so only K/128 that are multiples of
4, where both agree, are handed over. cuBLASLt also wants M and the width in multiples of 4 and 16. Not seen on a GPU
by this project's tests: the tuner compares its result with the reference before it may be chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalign.kernels.reference import check_matmul, check_wgrad
from megalign.kernels.tiles import TILE, Fp8Error, Fp8Tensor


def why_not(operation: str, m: int, n: int, k: int) -> str | None:
    """Why torch cannot take y [m, n] over k (matmul) or dW [n, k] over m (wgrad); None: it can."""
    if operation == "matmul":
        if m % 4 or n % 16 or -(-k // TILE) % 4:
            return f"M = {m} must be a multiple of 4, N = {n} of 16 and ceil(K/128) = {-(-k // TILE)} of 4"
        return None
    if operation == "wgrad":
        if n % 4 or k % 16 or m <= TILE:
            return f"N = {n} must be a multiple of 4 and K = {k} of 16, and M = {m} above {TILE}: one scale a row is another recipe to torch"
        return None
    return f"torch has no block-wise {operation}"


def _refuse(operation: str, m: int, n: int, k: int) -> None:
    reason = why_not(operation, m, n, k)
    if reason:
        raise Fp8Error(f"scaled_mm: {reason}")


def matmul(x: Fp8Tensor, w: Fp8Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """y [M, N] = x [M, K] w[N, K]^T; reference.matmul."""
    check_matmul(x, w)
    _refuse("matmul", x.rows, w.rows, x.columns)
    x, w = x.contiguous(), w.contiguous()
    return torch._scaled_mm(x.data, w.data.t(), scale_a=x.scale.t(), scale_b=w.scale.t(), out_dtype=dtype)  # pyright: ignore[reportPrivateImportUsage]


def wgrad(dy_t: Fp8Tensor, x_t: Fp8Tensor, out: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """dW [N, K] = dy^T [N, M] x^T[K, M]^T, added to `out` in place if it is given; reference.wgrad."""
    check_wgrad(dy_t, x_t, out)
    _refuse("wgrad", dy_t.columns, dy_t.rows, x_t.rows)
    dy_t, x_t = dy_t.contiguous(), x_t.contiguous()
    computed = torch.float32 if out is not None else dtype
    grad = torch._scaled_mm(dy_t.data, x_t.data.t(), scale_a=dy_t.scale.t(), scale_b=x_t.scale, out_dtype=computed)  # pyright: ignore[reportPrivateImportUsage]
    return grad if out is None else out.add_(grad)

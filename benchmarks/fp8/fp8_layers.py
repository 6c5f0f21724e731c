"""What Fp8Linear is compared with: BF16 layers, and FP8 without fusion."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megalign.kernels import backends, reference


class _Naive(torch.autograd.Function):
    """FP8 as it is first written: torch operations quantise x, W and their transposes in every call; x is saved in BF16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x, weight)
        return backends.matmul(reference.quantise_rows(x), reference.quantise_blocks(weight), x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        dx = backends.matmul(reference.quantise_rows(dy), reference.quantise_blocks(weight.t().contiguous()), x.dtype)
        dw = backends.wgrad(reference.quantise_rows(dy.t().contiguous()), reference.quantise_rows(x.t().contiguous()), dtype=weight.dtype)
        return dx, dw


class NaiveFp8Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        y: Any = _Naive.apply(input, self.weight)
        return y


class Bf16Experts(nn.Module):
    """One BF16 matmul an expert, [G, N, K]."""

    def __init__(self, groups: int, inputs: int, outputs: int, device: torch.device):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(groups, outputs, inputs, device=device, dtype=torch.bfloat16) * inputs**-0.5)

    def forward(self, x: Tensor, sizes: Tensor) -> Tensor:
        parts = x.split(x.shape[0] // len(self.weight))  # the benchmark's experts are even
        return torch.cat([part @ w.t() for part, w in zip(parts, self.weight)])


def torchao_layer(linear: nn.Linear) -> tuple[nn.Module | None, str]:
    """torchao's block-wise FP8 linear over `linear`, or why there is none."""
    try:  # a prototype: its name, its arguments and what it runs on change
        from torchao.prototype.blockwise_fp8_training.linear import Float8BlockwiseLinear  # pyright: ignore[reportMissingImports]

        return Float8BlockwiseLinear.from_float(linear), ""
    except ImportError as reason:
        return None, f"torchao is not there: {reason}"
    except Exception as failure:
        return None, f"torchao fails: {type(failure).__name__}: {failure}".splitlines()[0][:200]

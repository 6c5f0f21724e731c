"""The FP8 linear layer: three block-scaled FP8 matmuls behind torch's autograd.

    forward  y  = x W^T      x in 1 x 128 tiles, W in 128 x 128 blocks
    dgrad    dx = dy W       dy in 1 x 128 tiles, W^T in the same blocks
    wgrad    dW = dy^T x     dy^T and x^T in 1 x 128 tiles (of 128 tokens)

One read of x writes x and x^T in FP8; of the two, backward needs x^T alone, so that is all that is saved: one byte an
element and a scale for 128 of them, half of what a BF16 layer saves. One read of dy likewise serves dgrad and wgrad. W and
W^T arrive quantised (`weight.py`): the optimizer writes them once a step, no call does. Sums are FP32, promoted every 128
of the contracted dimension; y, dx and dW have the types of x, x and W.

With gradient_accumulation_fusion (megatron's name) dW is added, in FP32, to `weight.main_grad` (FP32 or BF16) by the kernel
that computes it, and the weight gets no .grad: microbatches add up without a BF16 rounding and without a temporary of the
size of W. Where megatron's DDP waits for the gradient (`weight.grad_added_to_main_grad`), it gets an empty one and is told.

`backends.py` picks the implementation of each matmul. On a CPU that is the torch reference: slow, with the real numbers.
The layers' parameters are ordinary ones, so state_dict, deepcopy, any optimizer and activation recomputation work as with
torch's. torch.compile leaves a layer as it is (one graph break).

# T tokens, M = T, K inputs, N outputs, G experts
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megalign.kernels import backends as fp8
from megalign.kernels.groups import GroupLayout
from megalign.kernels.tiles import Fp8Error, Fp8Tensor
from megalign.kernels.weight import Fp8Weight, Pair

DTYPES = (torch.bfloat16, torch.float32)
uncompiled: Any = torch.compiler.disable


@uncompiled
def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gradient_accumulation_fusion: bool = False) -> Tensor:
    """x [..., K] W[N, K]^T + bias [N] with FP8 matmuls in forward and backward.

    x, weight: bfloat16 or float32. Returns [..., N] in the type of x. Not twice differentiable.
    gradient_accumulation_fusion: add dW to weight.main_grad [N, K] instead of returning it.
    Raises Fp8Error for other types and for shapes that do not fit.
    """
    _check("fp8_linear", x, weight, 2)
    y: Any = _Linear.apply(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), weight, None, gradient_accumulation_fusion, _learns(weight))
    y = y.view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias.to(y.dtype)


@uncompiled
def fp8_grouped_linear(x: Tensor, weight: Tensor, sizes: Tensor, bias: Tensor | None = None, *, gradient_accumulation_fusion: bool = False) -> Tensor:
    """Rows of x [T, K], sorted by expert, `sizes` [G] of them each, times their W[g] [N, K]^T, plus bias [G, N].

    sizes may lie on the CPU, as megatron's dispatcher leaves them. Experts without a token are fine: their gradient is zero. Raises Fp8Error as fp8_linear does.
    """
    _check("fp8_grouped_linear", x, weight, 3)
    if x.dim() != 2 or sizes.shape != weight.shape[:1]:
        raise Fp8Error(f"fp8_grouped_linear: x is {tuple(x.shape)} and sizes {tuple(sizes.shape)}; give x [T, K] and one size for each of {weight.shape[0]} experts")
    layout = GroupLayout.of(sizes, x.shape[0], x.device)
    y: Any = _Linear.apply(x, weight, layout, gradient_accumulation_fusion, _learns(weight))
    if bias is None:
        return y
    return y + bias.to(y.dtype).repeat_interleave(sizes.to(x.device).long(), 0, output_size=x.shape[0])


class _Linear(torch.autograd.Function):
    """Both layers: `layout` is None for one weight [N, K], and says where the rows of each expert go for [G, N, K].

    Padding happens in here: torch would save the tokens for the backward of the copy.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layout: GroupLayout | None, fused: bool, learns: bool) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        holder = Fp8Weight.of(weight)
        w, w_t = holder.current(weight)
        x = x if layout is None else layout.pad(x)
        if learns:
            rows, columns = fp8.quantise_rows_both(x)
            ctx.save_for_backward(columns.data, columns.scale)
            ctx.tokens = columns.columns
        else:
            rows = fp8.quantise_rows(x)
        ctx.w_t, ctx.held, ctx.layout = w_t, [(holder, holder.made_from)], layout
        ctx.dtype, ctx.weight, ctx.fused = x.dtype, weight, fused
        return fp8.matmul(rows, w, x.dtype) if layout is None else layout.unpad(fp8.grouped_matmul(rows, w, layout, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        check_unchanged(ctx.held)
        layout: GroupLayout | None = ctx.layout
        dy = dy if layout is None else layout.pad(dy)
        dx = dw = None
        if ctx.needs_input_grad[1]:
            dy_rows, dy_t = fp8.quantise_rows_both(dy)
            data, scale = ctx.saved_tensors
            dw = weight_gradient(dy_t, Fp8Tensor(data, scale, ctx.tokens, "rows"), layout, ctx.weight, ctx.fused)
        else:
            dy_rows = fp8.quantise_rows(dy)
        if ctx.needs_input_grad[0]:
            dx = fp8.matmul(dy_rows, ctx.w_t, ctx.dtype) if layout is None else layout.unpad(fp8.grouped_matmul(dy_rows, ctx.w_t, layout, ctx.dtype))
        return dx, dw, None, None, None


def check_unchanged(held: list[tuple[Fp8Weight, Any]]) -> None:
    """Raises Fp8Error if an FP8 weight is not the one that forward multiplied with: the optimizer writes over its memory."""
    if any(holder.made_from != version for holder, version in held):
        raise Fp8Error("the weight of an FP8 layer changed between its forward and its backward; step the optimizer after backward")


def weight_gradient(dy_t: Fp8Tensor, x_t: Fp8Tensor, layout: GroupLayout | None, weight: Tensor, fused: bool) -> Tensor | None:
    """dW = dy^T x in the type of the weight; or, fused, added to weight.main_grad, and what autograd gets in its place.

    That is nothing, or an empty gradient for the hooks of megatron's DDP (distributed_data_parallel.py:420).
    """
    main = getattr(weight, "main_grad", None) if fused else None
    if fused and main is None:
        raise Fp8Error(f"gradient_accumulation_fusion: the weight {tuple(weight.shape)} has no main_grad; give it one (megatron's DDP does), or leave the fusion off")
    dtype = weight.dtype if main is None else main.dtype
    dw = fp8.wgrad(dy_t, x_t, main, dtype) if layout is None else fp8.grouped_wgrad(dy_t, x_t, layout, main, dtype)
    if main is None:
        return dw
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True  # pyright: ignore[reportAttributeAccessIssue]
    return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)


class Fp8Linear(nn.Linear):
    """nn.Linear whose matmuls are FP8; its parameters are BF16 unless told otherwise."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: torch.dtype = torch.bfloat16, *, gradient_accumulation_fusion: bool = False
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.gradient_accumulation_fusion = gradient_accumulation_fusion
        Fp8Weight.of(self.weight)  # tells MixedPrecisionAdamW to write the FP8 copy

    @classmethod
    def of(cls, linear: nn.Linear, *, gradient_accumulation_fusion: bool = False) -> Fp8Linear:
        """An FP8 layer over the parameters of `linear` (the same objects)."""
        layer = cls(linear.in_features, linear.out_features, False, "meta", linear.weight.dtype, gradient_accumulation_fusion=gradient_accumulation_fusion)
        layer.weight, layer.bias = linear.weight, linear.bias
        Fp8Weight.of(layer.weight)
        return layer

    @classmethod
    def where_it_pays(cls, linear: nn.Linear, tokens: int) -> nn.Linear:
        """`of(linear)`, or `linear` itself where BF16 is faster for `tokens` tokens a call (`backends.precision`).

        Decided once: a layer whose type changed with the batch would compute other numbers in evaluation than in training.
        """
        pays = fp8.precision(tokens, linear.out_features, linear.in_features, linear.weight.device) == "fp8"
        return cls.of(linear) if pays else linear

    def forward(self, input: Tensor) -> Tensor:
        return fp8_linear(input, self.weight, self.bias, gradient_accumulation_fusion=self.gradient_accumulation_fusion)

    def fp8(self) -> Pair:
        """(W, W^T) as the matmuls see them now: what an export writes."""
        return Fp8Weight.of(self.weight).current(self.weight)


class Fp8GroupedLinear(nn.Module):
    """The same layer of G experts, weight [G, N, K], in one call: forward(x [T, K] sorted by expert, sizes [G])."""

    def __init__(
        self, groups: int, in_features: int, out_features: int, bias: bool = False, device: Any = None, dtype: torch.dtype = torch.bfloat16,
        *, gradient_accumulation_fusion: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.gradient_accumulation_fusion = gradient_accumulation_fusion
        self.weight = nn.Parameter(torch.empty(groups, out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(groups, out_features, device=device, dtype=dtype)) if bias else None
        nn.init.uniform_(self.weight, -1 / math.sqrt(in_features), 1 / math.sqrt(in_features))  # as nn.Linear's
        Fp8Weight.of(self.weight)

    def forward(self, x: Tensor, sizes: Tensor) -> Tensor:
        return fp8_grouped_linear(x, self.weight, sizes, self.bias, gradient_accumulation_fusion=self.gradient_accumulation_fusion)

    def fp8(self) -> Pair:
        """(W, W^T) of all experts as the matmuls see them now."""
        return Fp8Weight.of(self.weight).current(self.weight)


def _learns(weight: Tensor) -> bool:
    """Whether there will be a backward that wants x^T; inside a Function torch says no to one question and yes to the other."""
    return torch.is_grad_enabled() and weight.requires_grad


def _check(name: str, x: Tensor, weight: Tensor, dims: int) -> None:
    if weight.dim() != dims or x.dim() == 0 or x.shape[-1] != weight.shape[-1]:
        raise Fp8Error(f"{name}: x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit; the weight must be {'[G, N, K]' if dims == 3 else '[N, K]'} and x end in K")
    if x.dtype not in DTYPES or weight.dtype not in DTYPES:
        raise Fp8Error(f"{name}: x is {x.dtype} and the weight {weight.dtype}; FP8 layers take bfloat16 or float32: convert them, or use nn.Linear")
    if x.device != weight.device:
        raise Fp8Error(f"{name}: x is on {x.device} and the weight on {weight.device}; move one")

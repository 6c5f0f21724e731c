"""The fused MLP: the numbers of its layers one by one, the error of FP8 against float64, and which kernels ran."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from checks import calc_diff, relative
from exact_interpreter import record_launches
from torch.utils.checkpoint import checkpoint

from megalign.kernels.elementwise import rms_norm, swiglu
from megalign.kernels.linear import fp8_linear
from megalign.kernels.mlp import Fp8MLP, fp8_mlp
from megalign.kernels.tiles import Fp8Error

BF16 = torch.bfloat16


def layer_and_inputs(dtype: torch.dtype = BF16) -> tuple[Any, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    layer = Fp8MLP(200, 256, dtype=dtype)
    with torch.no_grad():
        layer.norm.uniform_(0.5, 1.5)
    return layer, torch.randn(2, 70, 200, dtype=dtype), torch.randn(2, 70, 200, dtype=dtype)


def results(forward: Any, layer: Any, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    """y, dx and the gradients of norm, W1 and W2."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = forward(x)
    y.backward(dy)
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_fused_equals_its_layers_one_by_one(backend: str, monkeypatch: pytest.MonkeyPatch):
    """F8: the fusion leaves out writes and reads. Sums differ in the last bit, which moves a byte now and then."""
    layer, x, dy = layer_and_inputs()

    def one_by_one(x: torch.Tensor) -> torch.Tensor:
        h = fp8_linear(rms_norm(x, layer.norm, layer.eps), layer.gate_up.weight)
        return fp8_linear(swiglu(h.float()).to(BF16), layer.down.weight)  # FP32: in BF16, silu(gate) would be rounded too

    apart = results(one_by_one, layer, x, dy)
    monkeypatch.setenv("MEGALIGN_FP8_BACKEND", backend)
    with record_launches() as launches:
        fused = results(layer, layer, x, dy)
    kernels = [launch.kernel.split(":")[1] for launch in launches]
    forward = ["rms_kernel", "rms_quantise_kernel", "matmul_kernel", "swiglu_kernel", "matmul_kernel"]
    backward = ["quantise_rows_kernel", "wgrad_kernel", "matmul_kernel", "swiglu_backward_kernel", "wgrad_kernel", "matmul_kernel"]
    assert kernels == ([] if backend == "reference" else forward + backward)
    for found, expected in zip(fused, apart):
        assert found.dtype == expected.dtype and relative(found, expected) < 5e-3 and calc_diff(found, expected) < 1e-5


def test_error_against_float64_has_two_bounds():
    """Two FP8 matmuls in a row each way, W2's gradient through one quantised a: .037 once or twice, never BF16's .003."""
    layer, x, dy = layer_and_inputs(torch.float32)
    found = results(layer, layer, x, dy)
    exact: Any = copy.deepcopy(layer).double()

    def formula(x: torch.Tensor) -> torch.Tensor:
        gate, up = (torch.nn.functional.rms_norm(x, (200,), exact.norm, layer.eps) @ exact.gate_up.weight.t()).chunk(2, -1)
        return (torch.nn.functional.silu(gate) * up) @ exact.down.weight.t()

    for one, other in zip(found, results(formula, exact, x.double(), dy.double())):
        assert 0.030 < relative(one, other) < 0.090, relative(one, other)


def test_main_gradients_recomputation_and_frozen_weights():
    layer, x, dy = layer_and_inputs()
    plain = results(layer, layer, x, dy)
    again = results(lambda x: checkpoint(layer, x, use_reentrant=False), layer, x, dy)
    assert all(torch.equal(a, b) for a, b in zip(again, plain))

    layer.gradient_accumulation_fusion = True
    for linear in (layer.gate_up, layer.down):
        linear.weight.main_grad = torch.zeros(linear.weight.shape)
    fused = results(layer, layer, x, dy)
    assert fused[3] is None and fused[4] is None and torch.equal(fused[1], plain[1])
    for linear, expected in ((layer.gate_up, plain[3]), (layer.down, plain[4])):
        assert torch.equal(linear.weight.main_grad.to(BF16), expected)

    layer.gate_up.weight.requires_grad_(False)
    layer.down.weight.requires_grad_(False)
    frozen = results(layer, layer, x, dy)
    assert frozen[3:] == [None, None] and torch.equal(frozen[1], plain[1])


def test_what_cannot_be_done_says_so():
    layer, x, dy = layer_and_inputs()
    with pytest.raises(Fp8Error, match=r"w2 \(200, 256\); they must be"):
        fp8_mlp(x[..., :100], layer.norm, layer.gate_up.weight, layer.down.weight)
    with pytest.raises(Fp8Error, match="torch.float16 on cpu.*give bfloat16 or float32"):
        layer(x.half())
    with pytest.raises(Fp8Error, match="F a multiple of 128"):
        Fp8MLP(64, 100)(torch.randn(4, 64, dtype=BF16))
    y = layer(x)
    with torch.no_grad():
        layer.down.weight.mul_(2)
    layer(x)
    with pytest.raises(Fp8Error, match="changed between its forward and its backward"):
        y.backward(dy)
    assert layer(x[:0]).shape == (0, 70, 200)

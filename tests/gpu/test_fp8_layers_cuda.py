"""FP8 layers, AdamW and log-probabilities as compiled for the GPU. Run by `make test-gpu`; not run so far (no device yet)."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.detach().double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("backend", ["triton", "auto"])
@pytest.mark.parametrize("m, k, n", [(384, 128, 256), (512, 640, 384), (300, 200, 136), (4096, 4096, 512)])
def test_the_layer_has_the_error_of_fp8(backend: str, m: int, k: int, n: int, monkeypatch: pytest.MonkeyPatch):
    from megalign.kernels.linear import Fp8Linear

    monkeypatch.setenv("MEGALIGN_FP8_BACKEND", backend)
    layer = Fp8Linear(k, n, bias=False, device="cuda")
    x, dy = torch.randn(m, k, device="cuda", dtype=BF16, requires_grad=True), torch.randn(m, n, device="cuda", dtype=BF16)
    y = layer(x)
    y.backward(dy)
    assert x.grad is not None and layer.weight.grad is not None
    x64, w64, dy64 = x.detach().double(), layer.weight.detach().double(), dy.double()
    for found, exact in ((y, x64 @ w64.t()), (x.grad, dy64 @ w64), (layer.weight.grad, dy64.t() @ x64)):
        assert 0.030 < relative(found, exact) < 0.045


def test_experts_equal_layers_of_their_own():
    from megalign.kernels.linear import Fp8GroupedLinear, fp8_linear

    sizes = [300, 0, 1, 211]
    layer, x = Fp8GroupedLinear(4, 256, 384, device="cuda"), torch.randn(512, 256, device="cuda", dtype=BF16)
    y = layer(x, torch.tensor(sizes, device="cuda"))
    for part, own, w in zip(y.split(sizes), x.split(sizes), layer.weight):
        if len(own):
            assert relative(part, fp8_linear(own, w.detach()).double()) < 2.5e-3


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("moments", [BF16, torch.float32])
def test_adamw_leaves_the_bits_of_the_torch_path_on_cpu(fp8: bool, moments: torch.dtype):
    from megalign.kernels.adamw import MixedPrecisionAdamW
    from megalign.kernels.weight import Fp8Weight

    start = torch.randn(300, 200).to(BF16)
    states = []
    for device in ("cpu", "cuda"):
        p = torch.nn.Parameter(start.to(device, copy=True))  # a step writes into it
        if fp8:
            Fp8Weight.of(p)
        optimizer = MixedPrecisionAdamW([("w", p)], lr=1e-2, first_moment=moments, second_moment=moments)
        for step in range(3):
            p.grad = torch.randn(300, 200, generator=torch.Generator().manual_seed(step)).to(BF16).to(device)
            optimizer.step(gradient_scale=0.3)
        states.append([p.detach().cpu(), *(optimizer.state[p][name].cpu() for name in ("master", "exp_avg", "exp_avg_sq"))])
        if fp8:
            states[-1] += [t for part in Fp8Weight.of(p).current(p) for t in (part.data.view(torch.uint8).cpu(), part.scale.cpu())]
    assert all(torch.equal(a, b) for a, b in zip(*states))


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_logprobs_entropy_and_gradients(dtype: torch.dtype):
    from megalign.kernels.logprob import linear_logprobs

    n, depth, vocabulary = 300, 200, 5003
    hidden = torch.randn(n, depth, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, depth, device="cuda") / 8).to(dtype).requires_grad_()
    targets, g, h = torch.randint(0, vocabulary, (n,), device="cuda"), torch.randn(n, device="cuda"), torch.randn(n, device="cuda")
    found = linear_logprobs(hidden, weight, targets, entropy=True)
    torch.autograd.backward([found.logprobs, found.entropy], [g, h])
    exact_hidden, exact_weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    log_p = (exact_hidden @ exact_weight.t()).log_softmax(-1)
    exact = [log_p.gather(-1, targets[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)]
    torch.autograd.backward(exact, [g.double(), h.double()])
    for value, expected in zip(found, exact):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-4)
    bound = 2**-7 if dtype == BF16 else 1e-5
    for value, expected in ((hidden, exact_hidden), (weight, exact_weight)):
        assert value.grad is not None and expected.grad is not None
        torch.testing.assert_close(value.grad.double(), expected.grad, rtol=0, atol=bound * float(expected.grad.abs().max()))


def test_fused_norm_and_swiglu_equal_their_reference():
    from megalign.kernels import fused, fused_triton
    from megalign.kernels.reference import dequantise

    h, da = torch.randn(300, 512, device="cuda", dtype=BF16), torch.randn(300, 256, device="cuda", dtype=BF16)
    gamma = torch.rand(512, device="cuda", dtype=BF16)
    for name, inputs in (("rms_norm_quantise", (h, gamma)), ("swiglu_quantise", (h,)), ("swiglu_quantise_backward", (h, da))):
        for found, expected in zip(getattr(fused_triton, name)(*inputs)[:2], getattr(fused, name)(*inputs)[:2]):
            assert relative(dequantise(found), dequantise(expected).double()) < 2e-3


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_gradients_add_up_in_main_grad(dtype: torch.dtype):
    from megalign.kernels import backends
    from megalign.kernels.linear import Fp8Linear
    from megalign.kernels.reference import dequantise

    layer = Fp8Linear(640, 384, bias=False, device="cuda", gradient_accumulation_fusion=True)
    main = torch.zeros(384, 640, device="cuda", dtype=dtype)
    layer.weight.main_grad = main  # pyright: ignore[reportAttributeAccessIssue]
    exact = main.double()
    for _ in range(3):
        x, dy = torch.randn(512, 640, device="cuda", dtype=BF16), torch.randn(512, 384, device="cuda", dtype=BF16)
        layer(x).backward(dy)
        dy_t, x_t = (dequantise(backends.quantise_rows_both(t)[1], torch.float64) for t in (dy, x))
        exact += dy_t @ x_t.t()
    assert layer.weight.grad is None and relative(main, exact) < (1e-3 if dtype == torch.float32 else 5e-3)


def test_the_fused_mlp_has_the_error_of_fp8():
    from megalign.kernels.mlp import Fp8MLP

    layer = Fp8MLP(512, 384, device="cuda")
    x, dy = torch.randn(300, 512, device="cuda", dtype=BF16, requires_grad=True), torch.randn(300, 512, device="cuda", dtype=BF16)
    y = layer(x)
    y.backward(dy)
    exact_x, gamma, w1, w2 = (t.detach().double().requires_grad_() for t in (x, layer.norm, layer.gate_up.weight, layer.down.weight))
    gate, up = (torch.nn.functional.rms_norm(exact_x, (512,), gamma, layer.eps) @ w1.t()).chunk(2, -1)
    exact = (torch.nn.functional.silu(gate) * up) @ w2.t()
    exact.backward(dy.double())
    for found, expected in ((y, exact), *((a.grad, b.grad) for a, b in zip((x, *layer.parameters()), (exact_x, gamma, w1, w2)))):
        assert found is not None and expected is not None
        assert 0.030 < relative(found, expected.detach()) < 0.090

"""What must be right before anything is timed: every FP8 result against float64, on fresh random inputs.

Bounds are fp8.md's, both of them: a layer that is more exact than FP8 can be has fallen back to BF16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalign.kernels import backends, reference
from megalign.kernels.adamw import MixedPrecisionAdamW
from megalign.kernels.linear import Fp8GroupedLinear, Fp8Linear
from megalign.kernels.logprob import linear_logprobs

BF16 = torch.bfloat16
FP8 = (0.030, 0.045)  # relative error of a product of two FP8 matrices
QUANTISED = (0.02, 0.03)  # of one FP8 matrix
STEPS = (1, 2, 3, 5)  # K / 128


class Checks:
    """Largest relative error by name. Raises AssertionError if one is out of its bounds."""

    def __init__(self, device: torch.device, seed: int):
        self.device, self.seed, self.worst = device, seed, {}
        torch.manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.randn(shape, device=self.device).to(dtype)

    def check(self, name: str, found: Tensor, exact: Tensor, low: float, high: float) -> None:
        error = float((found.detach().double() - exact).norm() / exact.norm())
        self.worst[name] = max(self.worst.get(name, 0.0), error)
        assert low < error < high, f"{name}: relative error {error:.2e}, expected between {low} and {high}; nothing is timed (seed {self.seed})"


def correctness(device: torch.device, seed: int) -> dict[str, float]:
    """Largest relative error of each result against float64. Raises AssertionError if one is out of bounds."""
    checks = Checks(device, seed)
    for steps in STEPS:
        linear(checks, 384, 256, 128 * steps)
    experts(checks, [300, 0, 1, 467], 256, 384)
    norm_and_swiglu(checks)
    logprobs(checks)
    if device.type == "cuda":
        optimizer(device)
    return checks.worst


def linear(checks: Checks, m: int, n: int, k: int) -> None:
    """The layer against what is not quantised, its matmuls against float64 of their own operands, quantisation against the reference."""
    layer = Fp8Linear(k, n, bias=False, device=checks.device)
    x, dy = checks.normal(m, k).requires_grad_(), checks.normal(m, n)
    y = layer(x)
    y.backward(dy)
    assert x.grad is not None and layer.weight.grad is not None
    x64, w64, dy64 = x.detach().double(), layer.weight.detach().double(), dy.double()
    for name, found, exact in (("forward", y, x64 @ w64.t()), ("dgrad", x.grad, dy64 @ w64), ("wgrad", layer.weight.grad, dy64.t() @ x64)):
        checks.check(f"{name} against unquantised", found, exact, *FP8)
    both, expected = backends.quantise_rows_both(x.detach()), reference.quantise_rows_both(x.detach())
    for a, b in zip((*both, *layer.fp8()), (*expected, *reference.quantise_blocks_both(layer.weight.detach()))):
        assert torch.equal(a.data.view(torch.uint8), b.data.view(torch.uint8)) and torch.equal(a.scale, b.scale), "quantisation differs from the reference"
    (rows, x_t), (w, _), (_, dy_t) = both, layer.fp8(), backends.quantise_rows_both(dy)
    exact = reference.dequantise(rows, torch.float64) @ reference.dequantise(w, torch.float64).t()
    checks.check("matmul against its own FP8 operands", backends.matmul(rows, w), exact, 0, 2.5e-3)
    main = checks.normal(n, k, dtype=torch.float32)
    exact = main.double() + reference.dequantise(dy_t, torch.float64) @ reference.dequantise(x_t, torch.float64).t()
    within = 1e-3 if checks.device.type == "cuda" else 1e-6  # Hopper keeps about 14 bits within a step of 128
    checks.check("wgrad added to FP32, against its own FP8 operands", backends.wgrad(dy_t, x_t, main), exact, 0, within)


def experts(checks: Checks, sizes: list[int], n: int, k: int) -> None:
    """Uneven and empty experts, each against its own float64."""
    layer = Fp8GroupedLinear(len(sizes), k, n, device=checks.device)
    x, dy = checks.normal(sum(sizes), k).requires_grad_(), checks.normal(sum(sizes), n)
    y = layer(x, torch.tensor(sizes, device=checks.device))
    y.backward(dy)
    assert x.grad is not None and layer.weight.grad is not None
    parts = zip(sizes, *(t.detach().double().split(sizes) for t in (x, dy, y, x.grad)), layer.weight.detach().double(), layer.weight.grad)
    for size, x64, dy64, found, dx, w64, dw in parts:
        if size < 2:  # one row has no statistics
            assert size or not dw.any()
            continue
        for name, value, exact in (("forward", found, x64 @ w64.t()), ("dgrad", dx, dy64 @ w64), ("wgrad", dw, dy64.t() @ x64)):
            checks.check(f"experts' {name} against unquantised", value, exact, *FP8)


def norm_and_swiglu(checks: Checks) -> None:
    h, da, gamma = checks.normal(300, 512), checks.normal(300, 256), checks.normal(512).abs()
    wide = h.double().requires_grad_()
    a = torch.nn.functional.silu(wide[:, :256]) * wide[:, 256:]
    a.backward(da.double())
    assert wide.grad is not None
    norm = torch.nn.functional.rms_norm(h.double(), (512,), gamma.double(), 1e-5)
    for name, pair, exact in (
        ("RMSNorm", backends.rms_norm_quantise(h, gamma)[:2], norm),
        ("SwiGLU", backends.swiglu_quantise(h), a.detach()),
        ("SwiGLU backward", backends.swiglu_quantise_backward(h, da), wide.grad),
    ):
        for found, expected in zip(pair, (exact, exact.t())):
            checks.check(f"{name} in FP8", reference.dequantise(found), expected, *QUANTISED)


def logprobs(checks: Checks) -> None:
    """Values, entropy and both gradients; tails in every dimension."""
    n, depth, vocabulary = 300, 200, 1003
    inputs = [checks.normal(n, depth).requires_grad_(), (checks.normal(vocabulary, depth) / 8).requires_grad_()]
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    targets = torch.randint(0, vocabulary, (n,), device=checks.device)
    upstreams = [checks.normal(n, dtype=torch.float32) for _ in range(2)]
    found = linear_logprobs(inputs[0], inputs[1], targets, entropy=True)[:2]
    log_p = (exact_inputs[0] @ exact_inputs[1].t()).log_softmax(-1)
    exact = [log_p.gather(-1, targets[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)]
    torch.autograd.backward(found, upstreams)
    torch.autograd.backward(exact, [u.double() for u in upstreams])
    for name, a, b, high in (("log-probs", found[0], exact[0], 1e-3), ("entropy", found[1], exact[1], 1e-3)):
        checks.check(name, a, b.detach(), 0, high)
    for a, b in zip(inputs, exact_inputs):
        assert a.grad is not None and b.grad is not None
        checks.check("gradients of log-probs and entropy", a.grad, b.grad, 5e-4, 1e-2)  # rounded to BF16


def optimizer(device: torch.device) -> None:
    """The fused AdamW leaves the bits of the torch path, on this device."""
    states = []
    for backend in ("torch", "triton"):
        torch.manual_seed(1)
        layer = Fp8Linear(384, 256, bias=False, device=device)
        adamw = MixedPrecisionAdamW([("w", layer.weight)], lr=1e-2, backend=backend)
        for _ in range(3):
            layer.weight.grad = torch.randn_like(layer.weight)
            adamw.step()
        states.append([adamw.master(layer.weight), *(adamw.state[layer.weight][name] for name in ("exp_avg", "exp_avg_sq")), layer.fp8()[1].data.view(torch.uint8)])
    assert all(torch.equal(a, b) for a, b in zip(*states)), "the fused AdamW differs from the torch path"

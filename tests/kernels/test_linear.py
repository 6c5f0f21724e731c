"""Fp8Linear and Fp8GroupedLinear end to end: against unquantised float64, what they save, and where layers must work."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from checks import calc_diff, relative
from exact_interpreter import record_launches
from torch.utils.checkpoint import checkpoint

from megalign.kernels import backends, weight
from megalign.kernels.adamw import MixedPrecisionAdamW
from megalign.kernels.linear import Fp8GroupedLinear, Fp8Linear, fp8_linear
from megalign.kernels.reference import dequantise, quantise_blocks_both
from megalign.kernels.tiles import E4M3, Fp8Error
from megalign.kernels.weight import Fp8Weight, weights_changed

BF16 = torch.bfloat16


def fp8_error(found: torch.Tensor, exact: torch.Tensor) -> None:
    """fp8.md: both bounds, for a silent fallback to BF16 (.003) must fail as a wrong scale does."""
    error = relative(found, exact)
    assert 0.030 < error < 0.045 and -20 * math.log10(error) >= 27 and calc_diff(found, exact) < 1e-3, error


def three_results(layer: Fp8Linear, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(dy)
    assert x.grad is not None and layer.weight.grad is not None
    return [y.detach(), x.grad, layer.weight.grad]


def exact_results(layer: Fp8Linear, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    x64, w64, dy64 = x.double().flatten(0, -2), layer.weight.detach().double(), dy.double().flatten(0, -2)
    return [(x64 @ w64.t()).view(dy.shape), (dy64 @ w64).view(x.shape), dy64.t() @ x64]


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("shape, outputs", [((256, 256), 384), ((3, 50, 200), 130)])
def test_three_matmuls_have_the_error_of_fp8(shape: tuple[int, ...], outputs: int, dtype: torch.dtype):
    torch.manual_seed(0)
    layer = Fp8Linear(shape[-1], outputs, bias=False, dtype=dtype)
    x, dy = torch.randn(shape, dtype=dtype), torch.randn(*shape[:-1], outputs, dtype=dtype)
    for found, exact in zip(three_results(layer, x, dy), exact_results(layer, x, dy)):
        assert found.dtype == dtype and found.shape == exact.shape
        fp8_error(found, exact)


def test_long_sums_keep_their_precision():
    """F7, K = 4096: against the exact product of the same FP8 numbers, an FP32 result is right to 1e-6 (14 bits would give 1e-4)."""
    torch.manual_seed(0)
    layer = Fp8Linear(4096, 64, bias=False, dtype=torch.float32)
    x = torch.rand(32, 4096) + 0.5  # one sign: nothing cancels, errors add up
    with torch.no_grad():
        layer.weight.abs_()
        exact = dequantise(backends.quantise_rows(x), torch.float64) @ dequantise(layer.fp8()[0], torch.float64).t()
        assert relative(layer(x), exact) < 1e-6


def test_kernels_and_reference_give_the_same_layer(monkeypatch: pytest.MonkeyPatch):
    """F8: fused equals unfused, through the interpreter; the launches show that kernels ran."""
    torch.manual_seed(0)
    layer, x, dy = Fp8Linear(200, 136), torch.randn(150, 200).to(BF16), torch.randn(150, 136).to(BF16)
    results = {}
    for backend in ("reference", "triton"):
        monkeypatch.setenv("MEGALIGN_FP8_BACKEND", backend)
        with record_launches() as launches:
            results[backend] = three_results(layer, x, dy)
        kernels = sorted(launch.kernel.split(":")[1] for launch in launches)
        assert kernels == ([] if backend == "reference" else ["matmul_kernel"] * 2 + ["quantise_rows_kernel"] * 2 + ["wgrad_kernel"])
    for fused, plain in zip(results["triton"], results["reference"]):
        assert relative(fused, plain) < 2.5e-3 and calc_diff(fused, plain) < 1e-5


def test_bias():
    layer = Fp8Linear(128, 64)
    x = torch.randn(40, 128, dtype=BF16)
    y = layer(x)
    assert torch.equal(y, fp8_linear(x, layer.weight) + layer.bias)
    y.sum().backward()
    assert layer.bias.grad is not None and layer.bias.grad.dtype == BF16 and torch.equal(layer.bias.grad, torch.full((64,), 40.0, dtype=BF16))


def saved_bytes(layer: torch.nn.Module, *inputs: torch.Tensor) -> list[tuple[torch.dtype, int]]:
    """(type, bytes) of every tensor that autograd saves which is not a parameter."""
    saved = []
    own = {p.data_ptr() for p in layer.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        layer(*inputs)
    return [(t.dtype, t.nbytes) for t in saved if t.data_ptr() not in own]


def test_only_the_transposed_fp8_activation_is_saved():
    """One byte an element and a scale for 128 of them; a BF16 layer saves two bytes. A frozen weight saves nothing."""
    x = torch.randn(256, 384, dtype=BF16, requires_grad=True)
    assert saved_bytes(Fp8Linear(384, 128), x) == [(E4M3, 256 * 384), (torch.float32, 256 * 384 // 128 * 4)]
    frozen = Fp8Linear(384, 128)
    frozen.weight.requires_grad_(False)
    assert saved_bytes(frozen, x) == []


def test_evaluation_writes_no_transpose(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MEGALIGN_FP8_BACKEND", "triton")
    layer, x = Fp8Linear(128, 128), torch.randn(16, 128, dtype=BF16)
    layer(x)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), record_launches() as launches:
            layer(x)
        assert [launch.constants["COLUMNS"] for launch in launches if launch.kernel.endswith(":quantise_rows_kernel")] == [grad]


def test_a_weight_is_quantised_once_a_step(monkeypatch: pytest.MonkeyPatch):
    """Microbatches share it; the optimizer's own pass replaces it; any other in-place change is noticed."""
    calls = []
    monkeypatch.setattr(weight, "quantise_blocks_both", lambda w: (calls.append(1), quantise_blocks_both(w))[1])
    layer, x = Fp8Linear(128, 128), torch.randn(16, 128, dtype=BF16)
    optimizer = MixedPrecisionAdamW(layer.parameters(), lr=1e-2)
    for _ in range(3):
        layer(x).sum().backward()
    assert len(calls) == 1
    optimizer.step()
    layer(x)
    assert len(calls) == 1
    for got, want in zip(layer.fp8(), quantise_blocks_both(layer.weight.detach())):
        assert torch.equal(got.data.view(torch.uint8), want.data.view(torch.uint8)) and torch.equal(got.scale, want.scale)
    layer.load_state_dict(layer.state_dict())
    layer(x)
    assert len(calls) == 2
    layer.weight.data.mul_(2)  # behind the version counter
    weights_changed(layer)
    layer(x)
    assert len(calls) == 3


def test_gradients_accumulate_over_microbatches():
    layer, x = Fp8Linear(128, 128, bias=False, dtype=torch.float32), torch.randn(2, 64, 128)
    parts = []
    for microbatch in x:
        layer.zero_grad()
        layer(microbatch).square().sum().backward()
        assert layer.weight.grad is not None
        parts.append(layer.weight.grad.clone())
    layer.zero_grad()
    for microbatch in x:
        layer(microbatch).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, parts[0] + parts[1])


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_gradients_add_up_in_main_grad(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Four microbatches through the kernel that accumulates, against float64 of the same FP8 numbers; both bounds."""
    monkeypatch.setenv("MEGALIGN_FP8_BACKEND", "triton")
    torch.manual_seed(0)
    layer: Any = Fp8Linear(200, 136, bias=False, gradient_accumulation_fusion=True)
    plain: Any = copy.deepcopy(layer)
    plain.gradient_accumulation_fusion = False
    layer.weight.main_grad = torch.zeros(136, 200, dtype=dtype)
    exact = torch.zeros(136, 200, dtype=torch.float64)
    for _ in range(4):
        x, dy = torch.randn(150, 200).to(BF16), torch.randn(150, 136).to(BF16)
        plain(x).backward(dy)
        with record_launches() as launches:
            layer(x).backward(dy)
        (ran,) = [launch for launch in launches if launch.kernel.endswith(":wgrad_kernel")]
        assert ran.constants["ACCUMULATE"]
        exact += dequantise(backends.quantise_rows_both(dy)[1], torch.float64) @ dequantise(backends.quantise_rows_both(x)[1], torch.float64).t()
    assert layer.weight.grad is None
    error = relative(layer.weight.main_grad, exact)
    assert error < 1e-6 if dtype == torch.float32 else 1e-3 < error < 5e-3
    assert 1e-3 < relative(plain.weight.grad, exact) < 5e-3  # what torch's accumulation in BF16 loses
    optimizer = MixedPrecisionAdamW(layer.parameters(), lr=1e-2)
    before = layer.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(layer.weight, before)


def test_hooks_of_megatron_get_a_placeholder_and_nothing_else():
    layer: Any = Fp8Linear(128, 64, bias=False, gradient_accumulation_fusion=True)
    x, dy = torch.randn(32, 128, dtype=BF16), torch.randn(32, 64, dtype=BF16)
    with pytest.raises(Fp8Error, match=r"the weight \(64, 128\) has no main_grad; give it one"):
        layer(x).backward(dy)
    layer.weight.main_grad, layer.weight.grad_added_to_main_grad = torch.zeros(64, 128), False
    layer(x).backward(dy)
    assert layer.weight.grad_added_to_main_grad and layer.weight.grad.shape == (64, 128) and layer.weight.main_grad.any()
    layer.weight.grad, layer.weight.zero_out_wgrad = None, True
    layer(x).backward(dy)
    assert not layer.weight.grad.any()  # pyright: ignore[reportAttributeAccessIssue]  narrowed to the None above
    with pytest.raises(Fp8Error, match="main gradient here is contiguous float32 or bfloat16"):
        layer.weight.main_grad = torch.zeros(64, 128, dtype=torch.float16)
        layer(x).backward(dy)


def test_experts_add_up_in_main_grad():
    layer: Any = Fp8GroupedLinear(3, 128, 64, dtype=torch.float32, gradient_accumulation_fusion=True)
    plain: Any = copy.deepcopy(layer)
    plain.gradient_accumulation_fusion = False
    layer.weight.main_grad = torch.ones(3, 64, 128)
    for sizes in ([3, 0, 130], [0, 0, 133]):
        x, dy = torch.randn(133, 128), torch.randn(133, 64)
        for module in (layer, plain):
            module(x, torch.tensor(sizes)).backward(dy)
    torch.testing.assert_close(layer.weight.main_grad, plain.weight.grad + 1, rtol=1e-5, atol=1e-5)
    assert layer.weight.main_grad[1].eq(1).all() and layer.weight.grad is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_recomputation_changes_nothing(reentrant: bool):
    layer, x = Fp8Linear(128, 128), torch.randn(64, 128, dtype=BF16)
    dy = torch.randn(64, 128, dtype=BF16)
    plain = three_results(layer, x, dy)
    layer.zero_grad()
    again = x.clone().requires_grad_()
    y: Any = checkpoint(layer, again, use_reentrant=reentrant)
    y.backward(dy)
    for found, expected in zip((y, again.grad, layer.weight.grad), plain):
        assert found is not None and torch.equal(found, expected)


def test_compiled_or_not():
    layer, x, dy = Fp8Linear(128, 128), torch.randn(64, 128, dtype=BF16), torch.randn(64, 128, dtype=BF16)
    model = torch.nn.Sequential(torch.nn.RMSNorm(128, dtype=BF16), layer)
    expected = model(x)
    expected.backward(dy)
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    found = torch.compile(model, backend="aot_eager")(x)
    assert torch.equal(found, expected)
    found.backward(dy)
    for p, gradient in zip(model.parameters(), gradients):
        assert p.grad is not None and gradient is not None
        torch.testing.assert_close(p.grad, gradient, rtol=1e-2, atol=0)  # the norm's own backward is compiled
    assert torch.equal(layer.weight.grad, gradients[1])  # pyright: ignore[reportArgumentType]


def test_copies_and_state_dict():
    layer, x = Fp8Linear(128, 128), torch.randn(64, 128, dtype=BF16)
    expected = layer(x)
    copied = copy.deepcopy(layer)
    assert torch.equal(copied(x), expected) and Fp8Weight.of(copied.weight) is not Fp8Weight.of(layer.weight)
    with torch.no_grad():
        copied.weight.zero_()
    assert not copied(x).sub(copied.bias).any() and torch.equal(layer(x), expected)
    plain = torch.nn.Linear(128, 128, dtype=BF16)
    plain.load_state_dict(layer.state_dict())  # the same keys and types as torch's
    assert torch.equal(Fp8Linear.of(plain)(x), expected)


def test_what_cannot_be_done_says_so():
    layer = Fp8Linear(128, 64)
    with pytest.raises(Fp8Error, match=r"x is torch.float16 and the weight torch.bfloat16; FP8 layers take bfloat16 or float32"):
        layer(torch.randn(4, 128, dtype=torch.float16))
    with pytest.raises(Fp8Error, match=r"x \(4, 100\) and weight \(64, 128\) do not fit"):
        layer(torch.randn(4, 100, dtype=BF16))
    x = torch.randn(4, 128, dtype=BF16, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).float().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    y = layer(x)
    with torch.no_grad():
        layer.weight.mul_(2)
    layer(x)  # quantises the new weight over nothing: backward of y needs the old one
    with pytest.raises(Fp8Error, match="changed between its forward and its backward"):
        y.sum().backward()
    grouped = Fp8GroupedLinear(2, 128, 64)
    with pytest.raises(Fp8Error, match=r"sizes \[5, -1\] sum to 4, but there are 4 tokens; give each group 0 or more"):
        grouped(torch.randn(4, 128, dtype=BF16), torch.tensor([5, -1]))
    with pytest.raises(Fp8Error, match="one size for each of 2 experts"):
        grouped(torch.randn(4, 128, dtype=BF16), torch.tensor([1, 2, 1]))


def test_weights_made_in_inference_mode_are_never_old():
    """They count no changes, so every call quantises."""
    with torch.inference_mode():
        layer, x = Fp8Linear(128, 64, bias=False), torch.randn(16, 128, dtype=BF16)
        assert layer(x).any()
        layer.weight.zero_()
        assert not layer(x).any()


def test_odd_inputs():
    """Views, leading axes, one token, and an upstream without memory of its own."""
    layer = Fp8Linear(128, 64)
    wide = torch.randn(6, 5, 256, dtype=BF16)
    view = wide.transpose(0, 1)[..., 64:192]
    assert torch.equal(layer(view), layer(view.contiguous())) and torch.equal(layer(view[0, 0]), layer(view[:1, :1])[0, 0])
    first, second = (view.detach().clone().requires_grad_() for _ in range(2))
    layer(first).sum().backward()  # its upstream has strides of 0
    layer(second).backward(torch.ones(5, 6, 64, dtype=BF16))
    assert torch.equal(first.grad, second.grad)  # pyright: ignore[reportArgumentType]


def test_a_model_is_saved_and_loaded_whole(tmp_path):
    """pickle takes attributes of parameters along: the FP8 copy stays behind and is made again from the weight that is there."""
    layer, x = Fp8Linear(128, 64), torch.randn(16, 128, dtype=BF16)
    expected = layer(x)
    torch.save(layer, tmp_path / "layer.pt")
    loaded = torch.load(tmp_path / "layer.pt", weights_only=False)
    assert Fp8Weight.of(loaded.weight).pair is None and (tmp_path / "layer.pt").stat().st_size < 1.5 * layer.weight.nbytes
    assert torch.equal(loaded(x), expected)
    with torch.no_grad():
        loaded.weight.zero_()
    assert not loaded(x).sub(loaded.bias).any()


def test_autocast_does_not_reach_the_sums():
    """It would round each partial sum of the reference to BF16."""
    layer, x = Fp8Linear(512, 64, dtype=torch.float32), torch.randn(32, 512)
    expected = layer(x)
    with torch.autocast("cpu", BF16):
        found = layer(x)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_no_inputs():
    layer = Fp8Linear(0, 64)
    assert torch.equal(layer(torch.zeros(2, 3, 0, dtype=BF16)), layer.bias.detach().expand(2, 3, 64))


def test_no_tokens():
    layer = Fp8Linear(128, 64)
    layer(torch.randn(0, 128, dtype=BF16)).sum().backward()
    assert layer.weight.grad is not None and not layer.weight.grad.any()


@pytest.mark.parametrize("sizes", [[130, 0, 7, 200], [0, 0, 337, 0]])
def test_experts_are_separate_layers(sizes: list[int], monkeypatch: pytest.MonkeyPatch):
    """Uneven and empty experts: each has the results of a layer of its own, forward and backward."""
    torch.manual_seed(0)
    layer = Fp8GroupedLinear(4, 200, 136, bias=True, dtype=torch.float32)
    x, dy = torch.randn(337, 200), torch.randn(337, 136)
    variable = x.clone().requires_grad_()
    y = layer(variable, torch.tensor(sizes))
    y.backward(dy)
    assert variable.grad is not None and layer.weight.grad is not None and layer.bias is not None and layer.bias.grad is not None
    first = 0
    for g, size in enumerate(sizes):
        rows = slice(first, first + size)
        first += size
        if size == 0:
            assert not layer.weight.grad[g].any()
            continue
        own = Fp8Linear(200, 136, bias=False, dtype=torch.float32)
        own.load_state_dict({"weight": layer.weight[g].detach()})
        y_own, dx, dw = three_results(own, x[rows], dy[rows])
        for found, expected in ((y[rows], y_own + layer.bias[g]), (variable.grad[rows], dx), (layer.weight.grad[g], dw)):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.bias.grad[g], dy[rows].sum(0), rtol=1e-5, atol=1e-4)


def test_experts_save_one_byte_an_element():
    layer, x = Fp8GroupedLinear(2, 256, 128), torch.randn(256, 256, dtype=BF16, requires_grad=True)
    bytes_saved = sum(size for dtype, size in saved_bytes(layer, x, torch.tensor([128, 128])) if dtype in (E4M3, BF16))
    assert bytes_saved == 256 * (256 + 128)  # padded to the worst case: 127 rows an expert, in whole tiles

"""SwiGLU, RMSNorm and rotation against their formulas, differentiated by autograd in float64."""

import pytest
import torch

from megalign.kernels.elementwise import rms_norm, rotate, swiglu

ANGLES = torch.linspace(0.1, 3.0, 7 * 4, dtype=torch.float64).view(7, 1, 4)
EPS = 1e-3  # large enough that leaving it out shows


def swiglu_formula(x):
    gate, up = x.chunk(2, -1)
    return gate / (1 + torch.exp(-gate)) * up


def norm_formula(x, weight):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * weight


def rotation_formula(x):
    # As complex numbers: (x1 + i x2) e^(i angle).
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(ANGLES), ANGLES)
    return torch.cat([turned.real, turned.imag], -1)


CASES = {
    "swiglu": (lambda x: swiglu(x), swiglu_formula, [(7, 3, 10)]),
    "swiglu of a row": (lambda x: swiglu(x), swiglu_formula, [(6,)]),
    "norm": (lambda x, w: rms_norm(x, w, EPS), norm_formula, [(7, 3, 12), (12,)]),
    "norm of a row": (lambda x, w: rms_norm(x, w, EPS), norm_formula, [(12,), (12,)]),
    "rotation": (lambda x: rotate(x, ANGLES.cos().to(x.dtype), ANGLES.sin().to(x.dtype)), rotation_formula, [(7, 3, 8)]),
}
# Relative to the largest value: float64 as good as exact, FP32 a few roundings of 2^-24, BF16 a few of 2^-9.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 8 * 2**-24, torch.bfloat16: 3 * 2**-9}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients_are_those_of_the_formula(case, dtype):
    ours, formula, shapes = CASES[case]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, expected = ours(*inputs), formula(*exact)
    assert out.dtype == dtype
    grad = torch.randn(expected.shape, generator=generator, dtype=torch.float64).to(dtype)
    out.backward(grad)
    expected.backward(grad.double())
    pairs = [(out, expected), *((x.grad, y.grad) for x, y in zip(inputs, exact))]
    for found, wanted in pairs:
        assert found.dtype == dtype
        assert (found.double() - wanted).abs().max() <= TOLERANCE[dtype] * wanted.abs().max()


def test_views_and_gradients_that_are_not_contiguous_are_taken():
    whole = torch.randn(4, 5, 24, dtype=torch.float64)
    for function, formula in ((swiglu, swiglu_formula), (lambda x: rms_norm(x, torch.ones(8, dtype=x.dtype), EPS), lambda x: norm_formula(x, 1.0))):
        view = whole.transpose(0, 1)[..., 3:11].detach().requires_grad_()
        plain = view.detach().clone().requires_grad_()
        out, expected = function(view), formula(plain)
        grad = torch.randn(expected.shape[::-1], dtype=torch.float64).permute(2, 1, 0)
        out.backward(grad)
        expected.backward(grad)
        torch.testing.assert_close(view.grad, plain.grad, rtol=1e-13, atol=1e-13)


def test_only_the_inputs_are_kept():
    kept = []

    def remember(tensor):
        kept.append(tensor)
        return tensor

    x, weight = torch.randn(9, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        swiglu(x)
        rms_norm(x, weight, EPS)
    assert [tuple(tensor.shape) for tensor in kept] == [(9, 8), (9, 8), (8,), (9, 1)]

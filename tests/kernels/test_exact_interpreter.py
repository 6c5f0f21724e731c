"""The corrected interpreter against torch and against the E4M3 table, and how wrong the stock one is."""

from __future__ import annotations

import exact_interpreter
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from megalign.kernels.launch import launch


@triton.jit
def convert(x_ptr, y_ptr, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(y_ptr.dtype.element_ty))


@triton.jit
def dot(a_ptr, b_ptr, c_ptr, n: tl.constexpr):
    i = tl.arange(0, n)
    a = tl.load(a_ptr + i[:, None] * n + i[None, :])
    b = tl.load(b_ptr + i[:, None] * n + i[None, :])
    tl.store(c_ptr + i[:, None] * n + i[None, :], tl.dot(a, b))


def through_kernel(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    launch(convert, (1,), x, y, n=x.numel(), device=x.device)
    return y


def same_bits(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Elementwise; any NaN equals any NaN, for its sign and payload are not specified."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return (a.view(bits) == b.view(bits)) | (a.float().isnan() & b.float().isnan())


def all_bf16() -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def awkward_fp32() -> torch.Tensor:
    """Random bit patterns (every exponent, subnormals, NaN), ties of E4M3 and of BF16 with neighbours, ends of ranges."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (2**16,), generator=generator).int().view(torch.float32)
    around_fp8 = torch.randn(2**15, generator=generator) * torch.exp2(torch.randint(-12, 10, (2**15,), generator=generator).float())
    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (grid[1:] + grid[:-1]) / 2
    bf16_ties = (torch.randint(-(2**15), 2**15, (2**14,), generator=generator).int() << 16 | 0x8000).view(torch.float32)
    ends = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 448.0, 464.0, 464.00003, 3e38, 1e-45, -1e-45, 2.0**-10, 2.0**-9])
    near = torch.cat([torch.nextafter(ties, torch.tensor(0.0)), ties, torch.nextafter(ties, torch.tensor(1e9))])
    values = torch.cat([bits, around_fp8, near, -near, bf16_ties, ends])
    return torch.cat([values, torch.zeros(2**17 - values.numel())])


def nearest_e4m3(x: torch.Tensor) -> torch.Tensor:
    """By the definition, in float64: the nearest of the 127 magnitudes, the even one of two, 448 beyond the end."""
    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    magnitude = x.double().abs().nan_to_num(0.0).clamp(max=448)
    above = torch.searchsorted(grid, magnitude).clamp(max=126)
    below = (above - 1).clamp(min=0)
    to_below, to_above = magnitude - grid[below], grid[above] - magnitude
    take_above = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    code = torch.where(take_above, above, below) | torch.where(torch.signbit(x), 128, 0)
    return torch.where(x.isnan(), 127, code).to(torch.uint8).view(torch.float8_e4m3fn)


@pytest.mark.parametrize("make", [all_bf16, awkward_fp32])
def test_to_e4m3_is_the_nearest_and_saturates(make):
    x = make()
    got = through_kernel(x, torch.float8_e4m3fn)
    assert same_bits(got, x.float().clamp(-448, 448).to(torch.float8_e4m3fn)).all()
    assert same_bits(got, nearest_e4m3(x)).all()


def test_to_bf16_and_back():
    x = awkward_fp32()
    assert same_bits(through_kernel(x, torch.bfloat16), x.to(torch.bfloat16)).all()
    narrow = all_bf16()
    assert same_bits(through_kernel(narrow, torch.float32), narrow.float()).all()
    e4m3 = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn)
    assert same_bits(through_kernel(e4m3, torch.float32), e4m3.float()).all()
    assert same_bits(through_kernel(e4m3, torch.bfloat16), e4m3.to(torch.bfloat16)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float16, torch.float32])
def test_dot_multiplies_numbers(dtype: torch.dtype):
    a, b, c = torch.randn(64, 64).to(dtype), torch.randn(64, 64).to(dtype), torch.empty(64, 64)
    launch(dot, (1,), a, b, c, n=64, device=a.device)
    exact = a.double() @ b.double()
    assert (c - exact).norm() / exact.norm() < 1e-6


def test_the_stock_interpreter_is_wrong(monkeypatch: pytest.MonkeyPatch):
    """What the correction is for; a Triton that no longer needs it turns this red."""
    monkeypatch.setattr(interpreter, "_convert_float", exact_interpreter.stock_convert_float)
    x = torch.randn(2**14)
    assert (~same_bits(through_kernel(x, torch.float8_e4m3fn), nearest_e4m3(x))).float().mean() > 0.01
    assert (~same_bits(through_kernel(x, torch.bfloat16), x.bfloat16())).float().mean() > 0.2
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", exact_interpreter.stock_create_dot)
    a, c = torch.eye(16).bfloat16(), torch.empty(16, 16)
    launch(dot, (1,), a, a, c, n=16, device=a.device)
    assert not np.allclose(c.numpy(), np.eye(16))


def test_launches_are_recorded():
    with exact_interpreter.record_launches() as launches:
        through_kernel(torch.randn(16), torch.bfloat16)
    assert [launch.kernel.split(":")[1] for launch in launches] == ["convert"] and launches[0].constants == {"n": 16}
    through_kernel(torch.randn(16), torch.bfloat16)
    assert len(launches) == 1

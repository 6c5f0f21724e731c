"""The AdamW kernels against the torch path: the same bits in masters, moments, parameters and FP8 copies."""

from __future__ import annotations

import math
from typing import Any

import ahead
import pytest
import torch
from exact_interpreter import record_launches

from megalign.kernels.adamw import MixedPrecisionAdamW
from megalign.kernels.linear import Fp8Linear
from megalign.kernels.rounding import Place
from megalign.kernels.tiles import Fp8Error
from megalign.kernels.weight import Fp8Weight

BF16, FP32 = torch.bfloat16, torch.float32


def both_paths(shape: tuple[int, ...], dtype: torch.dtype, *, fp8: bool, steps: int = 2, place: Place | None = None, edit: Any = None, **settings: Any) -> list[str]:
    """Names of what differs after `steps` of the two paths from the same start."""
    start = torch.randn(*shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    runs = []
    for backend in ("torch", "triton"):
        p = torch.nn.Parameter(start.clone())
        if fp8:
            Fp8Weight.of(p)
        if place is not None:
            p.place = place  # pyright: ignore[reportAttributeAccessIssue]
        optimizer = MixedPrecisionAdamW([("weight", p)], lr=1e-2, betas=(0.9, 0.95), backend=backend, **settings)
        for step in range(steps):
            p.grad = torch.randn(*shape, generator=torch.Generator().manual_seed(step)).to(dtype)
            if edit is not None:
                edit(p.grad)
            optimizer.step(gradient_scale=0.3)
        runs.append({**optimizer.state[p], "parameter": p.detach()})
        if fp8:
            holder = Fp8Weight.of(p)
            version = holder.made_from
            for name, part in zip(("W", "W^T"), holder.current(p)):
                bytes_ = part.data.view(torch.uint8).masked_fill(part.data.float().isnan(), 0x7F)  # the sign of a NaN is not specified
                runs[-1] |= {f"{name} bytes": bytes_, f"{name} scale": part.scale.view(torch.int32)}
            assert holder.made_from == version, "the step left an old FP8 copy"
    return [name for name in runs[0] if not torch.equal(*(_bits(run[name]) for run in runs))]


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32) if x.dtype == FP32 else x.view(torch.int16) if x.dtype == BF16 else x


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("first, second, rounding", [(BF16, BF16, "stochastic"), (BF16, FP32, "stochastic"), (FP32, FP32, "nearest"), (BF16, BF16, "nearest")])
def test_flat_kernel_gives_the_bits_of_torch(dtype: torch.dtype, first: torch.dtype, second: torch.dtype, rounding: str):
    with record_launches() as launches:
        assert both_paths((77, 60), dtype, fp8=False, first_moment=first, second_moment=second, rounding=rounding) == []
    assert [launch.kernel.split(":")[1] for launch in launches] == ["adamw_flat_kernel"] * 2


@pytest.mark.parametrize("shape", [(128, 128), (200, 300), (3, 130), (129, 1), (2, 140, 96)])
def test_tile_kernel_gives_the_bits_of_torch_and_the_fp8_copy(shape: tuple[int, ...]):
    """Whole tiles, tails in both directions, and the weights of two experts."""
    with record_launches() as launches:
        assert both_paths(shape, BF16, fp8=True) == []
    assert [launch.kernel.split(":")[1] for launch in launches] == ["adamw_fp8_kernel"] * 2  # and no quantisation after it


def test_tile_kernel_of_fp32_parameters():
    assert both_paths((140, 150), FP32, fp8=True, first_moment=FP32, second_moment=FP32) == []


@pytest.mark.parametrize("fp8", [False, True])
def test_shards_draw_the_noise_of_their_place(fp8: bool):
    """A cut by columns behind 2^32 elements: both halves of the counter count."""
    place = Place(offset=5 * 2**32 + 60, columns=60, row_stride=120)
    assert both_paths((40, 60), BF16, fp8=fp8, place=place) == []
    assert both_paths((40, 60), BF16, fp8=fp8, place=Place(offset=7, start=600)) == []  # whole rows behind the tenth
    if not fp8:
        assert both_paths((2400,), BF16, fp8=False, place=Place(60, 60, 120, start=1000)) == []


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_non_finite_gradient_marks_its_tile_alone(value: float):
    def edit(gradient: torch.Tensor) -> None:
        gradient[150, 20] = value

    assert both_paths((200, 260), BF16, fp8=True, steps=1, edit=edit) == []
    p = torch.nn.Parameter(torch.randn(200, 260).to(BF16))
    holder = Fp8Weight.of(p)
    p.grad = torch.randn(200, 260).to(BF16)
    edit(p.grad)
    MixedPrecisionAdamW([p], backend="triton").step()
    forward, _ = holder.current(p)
    assert forward.scale.isnan().tolist() == [[False, False, False], [True, False, False]] and int(forward.non_finite_tiles()) == 1


def test_a_step_between_forward_and_backward_is_noticed():
    """A kernel writes behind torch's version counter, here over the W^T that backward would read."""
    layer, x = Fp8Linear(128, 128, bias=False), torch.randn(16, 128, dtype=BF16)
    optimizer = MixedPrecisionAdamW(layer.parameters(), backend="triton")
    y, version = layer(x), layer.weight._version
    layer.weight.grad = torch.randn_like(layer.weight)
    optimizer.step()
    assert layer.weight._version > version
    with pytest.raises(Fp8Error, match="changed between its forward and its backward"):
        y.sum().backward()
    plain = torch.nn.Parameter(torch.randn(64, dtype=BF16))
    plain.grad, version = torch.randn_like(plain), plain._version
    MixedPrecisionAdamW([plain], backend="triton").step()
    assert plain._version > version


def test_what_is_compiled_ahead_is_what_was_launched():
    """Also without fused multiply-adds: with them the bits of torch would not be those of the machine code that was looked at."""
    with record_launches() as launches:
        for moments in (BF16, FP32):
            for fp8 in (False, True):
                for dtype in (BF16, FP32):
                    both_paths((8, 16), dtype, fp8=fp8, steps=1, first_moment=moments, second_moment=moments)
    cases = ahead.load_cases("cases_adamw")
    assert not ahead.unlaunched(cases, launches)
    assert all(case.options == {"enable_fp_fusion": False} for case in cases)


def test_a_flat_slice_has_no_tiles():
    with pytest.raises(ValueError, match="its columns must be 60 and its start 0"):
        both_paths((40, 60), BF16, fp8=True, place=Place(60, 30, 120))

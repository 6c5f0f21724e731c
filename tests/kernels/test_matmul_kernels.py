"""The matmul kernels, interpreted, against float64; and that they, not the reference, were what ran."""

from __future__ import annotations

import math

import ahead
import pytest
import torch
from checks import calc_diff, check_grouped, check_matmul, check_promotion, check_wgrad, relative, uneven
from exact_interpreter import record_launches
from hypothesis import given, settings
from hypothesis import strategies as st

from megalign.kernels import matmul, quantise, reference, wgrad
from megalign.kernels.groups import GroupLayout
from megalign.kernels.tiles import Fp8Error, Fp8Tensor

# K / 128 of 1, 2, 3 and 5; N that ends inside a cut, a block, a row of 16 bytes
SHAPES = [(128, 192, 128), (130, 200, 256), (1, 16, 384), (64, 330, 640), (100, 77, 200)]
GROUPS = [[3, 0, 130], [0, 0, 5], [128, 256, 0]]


@pytest.mark.parametrize("config", matmul.CONFIGS, ids=str)
@pytest.mark.parametrize("m, n, k", SHAPES)
def test_matmul(m: int, n: int, k: int, config: matmul.MatmulConfig):
    with record_launches() as launches:
        check_matmul(matmul, m, n, k, config)
    assert [launch.kernel for launch in launches] == ["megalign.kernels.matmul:matmul_kernel"]


def test_matmul_rounds_once_to_bf16():
    check_matmul(matmul, 130, 200, 640, matmul.CONFIGS[0], torch.bfloat16)
    check_matmul(matmul, 20, 77, 200, matmul.CONFIGS[1], torch.bfloat16)


@pytest.mark.parametrize("config", matmul.CONFIGS, ids=str)
def test_steps_are_promoted_with_their_own_scales(config: matmul.MatmulConfig):
    check_promotion(matmul, config)


def test_fp32_scales_are_as_good():
    """F3's other scales, amax / 448: the matmuls take any FP32 number for a scale."""
    check_matmul(matmul, 130, 200, 384, matmul.CONFIGS[0], power_of_two=False)
    check_wgrad(wgrad, 300, 136, 200, wgrad.CONFIGS[0], torch.randn(136, 200), power_of_two=False)


def test_a_view_is_multiplied_as_what_it_is():
    """Kernels count on operands without strides; a cut of a larger Fp8Tensor has them."""
    rows, blocks = reference.quantise_rows(uneven(200, 384)), reference.quantise_blocks(uneven(300, 384))
    x = Fp8Tensor(rows.data[3:, :256], rows.scale[:2, 3:], 256, "rows")
    w = Fp8Tensor(blocks.data[:, :256], blocks.scale[:, :2], 256, "blocks")
    other = Fp8Tensor(rows.data[:77, :256], rows.scale[:2, :77], 256, "rows")
    assert not any(t.data.is_contiguous() or t.scale.is_contiguous() for t in (x, w, other))
    assert relative(matmul.matmul(x, w, torch.float32), reference.matmul(x, w, torch.float32)) < 1e-6
    assert relative(wgrad.wgrad(x, other), reference.wgrad(x, other)) < 1e-6


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 300), st.sampled_from(matmul.CONFIGS), st.sampled_from(wgrad.CONFIGS))
def test_any_shape(m: int, n: int, k: int, forward: matmul.MatmulConfig, backward: wgrad.WgradConfig):
    check_matmul(matmul, m, n, k, forward)
    check_wgrad(wgrad, m, n, k, backward)


@pytest.mark.parametrize("config", wgrad.CONFIGS, ids=str)
@pytest.mark.parametrize("m, n, k", [(128, 128, 192), (200, 130, 200), (640, 64, 48)])
def test_wgrad(m: int, n: int, k: int, config: wgrad.WgradConfig):
    with record_launches() as launches:
        check_wgrad(wgrad, m, n, k, config)
        check_wgrad(wgrad, m, n, k, config, torch.randn(n, k))
        check_wgrad(wgrad, m, n, k, config, torch.randn(n, k).bfloat16())
    assert [launch.constants["ACCUMULATE"] for launch in launches] == [False, True, True]


def test_main_gradients_that_tma_cannot_reach():
    flat = torch.randn(50 * 40 + 1)
    check_wgrad(wgrad, 100, 50, 40, wgrad.CONFIGS[0], flat[1:].view(50, 40))  # not on 16 bytes
    check_wgrad(wgrad, 100, 50, 37, wgrad.CONFIGS[0], torch.randn(50, 37))  # rows of 148 bytes
    check_wgrad(wgrad, 100, 50, 37, wgrad.CONFIGS[0], torch.randn(50, 37).bfloat16())


@pytest.mark.parametrize("sizes", GROUPS, ids=str)
@pytest.mark.parametrize("configs", list(zip(matmul.CONFIGS, wgrad.CONFIGS)), ids=str)
def test_grouped(sizes: list[int], configs: tuple[matmul.MatmulConfig, wgrad.WgradConfig]):
    with record_launches() as launches:
        check_grouped(matmul, wgrad, sizes, 72, 200, configs)
    assert [launch.constants["GROUPED"] for launch in launches] == [True, True]


def test_grouped_without_accumulation_and_with_whole_blocks():
    check_grouped(matmul, wgrad, [130, 0, 7], 128, 128, (matmul.CONFIGS[0], wgrad.CONFIGS[0]), accumulate=False)
    check_grouped(matmul, wgrad, [1, 2], 200, 77, (matmul.CONFIGS[1], wgrad.CONFIGS[0]), accumulate=False)


def test_what_is_compiled_ahead_is_what_was_launched():
    rows, blocks, experts = (f(torch.randn(s)) for f, s in ((reference.quantise_rows, (16, 16)), (reference.quantise_blocks, (16, 16)), (reference.quantise_blocks, (2, 16, 16))))
    layout = GroupLayout.of(torch.tensor([1, 1]), 2)
    x, x_t = reference.quantise_rows_both(layout.pad(torch.randn(2, 16)))
    with record_launches() as launches:
        for config in matmul.CONFIGS:
            matmul.matmul(rows, blocks, config=config)
            matmul.grouped_matmul(x, experts, layout, config=config)
        for config in wgrad.CONFIGS:
            for out in (None, torch.zeros(16, 16)):
                wgrad.wgrad(rows, rows, out, config=config)
            for out in (None, torch.zeros(2, 16, 16)):
                wgrad.grouped_wgrad(x_t, x_t, layout, out, config=config)
    assert not ahead.unlaunched(ahead.load_cases("cases_matmul"), launches)


def test_a_marked_tile_reaches_its_outputs_and_no_others():
    x, w = torch.randn(130, 200), torch.randn(72, 200)
    x[7, 150] = math.nan
    y = matmul.matmul(quantise.quantise_rows(x), quantise.quantise_blocks(w), torch.float32)
    assert y[7].isnan().all() and y.isnan().sum() == 72
    grad = wgrad.wgrad(quantise.quantise_rows_both(torch.randn(130, 72))[1], quantise.quantise_rows_both(x)[1])
    assert grad[:, 150].isnan().all() and grad.isnan().sum() == 72


def test_end_to_end_error_has_two_bounds():
    """Quantise and multiply with the kernels, against unquantised float64: no silent BF16, no wrong tile."""
    x, w, dy = torch.randn(256, 384), torch.randn(192, 384) / math.sqrt(384), torch.randn(256, 192) * 1e-3
    (xq, xt), (wq, wt), (dyq, dyt) = quantise.quantise_rows_both(x), quantise.quantise_blocks_both(w), quantise.quantise_rows_both(dy)
    for got, want in [
        (matmul.matmul(xq, wq, torch.float32), x.double() @ w.double().t()),
        (matmul.matmul(dyq, wt, torch.float32), dy.double() @ w.double()),
        (wgrad.wgrad(dyt, xt), dy.double().t() @ x.double()),
    ]:
        error = relative(got, want)
        assert 0.030 < error < 0.045 and -20 * math.log10(error) >= 27 and calc_diff(got, want) < 1e-3


def test_empty_operands():
    blocks = reference.quantise_blocks(torch.randn(16, 128))
    assert matmul.matmul(reference.quantise_rows(torch.empty(0, 128)), blocks).shape == (0, 16)
    none = reference.quantise_rows(torch.empty(16, 0))
    assert not wgrad.wgrad(none, none).any()
    main = torch.ones(16, 16)
    assert wgrad.wgrad(none, none, main).eq(1).all()


def test_refusals():
    rows, blocks = reference.quantise_rows(torch.randn(4, 200)), reference.quantise_blocks(torch.randn(4, 130))
    with pytest.raises(Fp8Error, match="differ: 200 and 130"):
        matmul.matmul(rows, blocks)
    with pytest.raises(Fp8Error, match="main gradient here is contiguous"):
        wgrad.wgrad(rows, rows, torch.zeros(4, 4).t()[:, :3])

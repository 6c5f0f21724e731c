"""The torch reference of the FP8 kernels against float64 and against the definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalign.kernels import reference as ref
from megalign.kernels.groups import GroupLayout
from megalign.kernels.tiles import E4M3, TILE, Fp8Error, Fp8Tensor, round_up


def bytes_of(t: torch.Tensor) -> torch.Tensor:
    return t.view(torch.uint8)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def calc_diff(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double(), b.double()
    return (1 - 2 * (a * b).sum() / ((a * a).sum() + (b * b).sum())).item()


def every_mantissa(exponent: int) -> torch.Tensor:
    return (torch.arange(2**23, dtype=torch.int32) + ((exponent + 127) << 23)).view(torch.float32)


# --- scales ---------------------------------------------------------------------------------------------------------


def test_scale_is_the_smallest_power_of_two_up_to_464():
    amax = torch.cat([every_mantissa(0)[::97], 2.0 ** torch.arange(-117, 128, dtype=torch.float64).float(), torch.tensor([464.0, 463.99997, 464.00003, 448.0])])
    scale, factor = ref.tile_scale(amax)
    exact = amax.double()
    expected = 2.0 ** torch.ceil(torch.log2(exact / 464))
    torch.testing.assert_close(scale.double(), expected, rtol=0, atol=0)
    assert torch.equal(scale * factor, torch.ones_like(scale))
    assert ((exact / scale.double() <= 464) & (exact / (scale.double() / 2) > 464)).all()


def test_scale_at_the_ends_of_the_range():
    amax = torch.tensor([0.0, 1e-45, 2.0**-126, torch.finfo(torch.float32).max])
    scale, factor = ref.tile_scale(amax)
    assert torch.equal(scale[:3], torch.full((3,), 2.0**-126)) and torch.equal(factor[:3], torch.full((3,), 2.0**126))
    assert scale[3] == 2.0**120
    for power_of_two in (True, False):
        marked = ref.tile_scale(torch.tensor([torch.inf, torch.nan]), power_of_two=power_of_two)
        assert marked[0].isnan().all() and marked[1].isnan().all()


@pytest.mark.parametrize("through", [torch.float32, torch.bfloat16])
def test_every_mantissa_is_a_fixed_point(through: torch.dtype):
    """The largest number of a tile never changes its scale by being quantised: all 2^23 mantissas."""
    amax = every_mantissa(3)
    scale, factor = ref.tile_scale(amax)
    once = ((amax * factor).clamp(max=448).to(E4M3).float() * scale).to(through).float()
    again, factor = ref.tile_scale(once)
    assert torch.equal(again, scale)
    assert torch.equal((once * factor).clamp(max=448).to(E4M3).float() * again, once)


# --- quantisation ---------------------------------------------------------------------------------------------------


def naive_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, one tile at a time in float64."""
    rows, columns = x.shape
    data, scale = torch.zeros(rows, round_up(columns), dtype=torch.float64), torch.zeros(round_up(columns) // TILE, rows)
    for r in range(rows):
        for k in range(scale.shape[0]):
            tile = x[r, k * TILE : (k + 1) * TILE].double()
            amax = tile.abs().max().item()
            scale[k, r] = max(2.0 ** math.ceil(math.log2(amax / 464)), 2.0**-126) if amax else 2.0**-126
            data[r, k * TILE : k * TILE + tile.numel()] = (tile / scale[k, r]).clamp(-448, 448)
    return bytes_of(data.float().to(E4M3)), scale


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 300), st.floats(-30, 30), st.integers(0, 2**31))
def test_rows_follow_the_definition(rows: int, columns: int, log_size: float, seed: int):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2.0**log_size
    q = ref.quantise_rows(x)
    data, scale = naive_rows(x)
    assert torch.equal(bytes_of(q.data), data) and torch.equal(q.scale, scale)
    assert q.shape == (rows, columns) and q.data.shape[1] % 128 == 0
    assert not bytes_of(q.data)[:, columns:].any()


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (130, 200), (300, 128), (2, 257), (3, 200, 130)])
def test_blocks_follow_rows_of_their_largest(shape: tuple[int, ...]):
    """A block's scale is the largest of the 1 x 128 scales in it, and its bytes are those numbers over that scale."""
    w = torch.randn(shape) * torch.exp(torch.randn(shape))
    q = ref.quantise_blocks(w)
    assert q.shape == shape
    for g, block in enumerate(w if w.dim() == 3 else [w]):
        scale, data = (q.scale[g], q.data[g]) if w.dim() == 3 else (q.scale, q.data)
        by_row = ref.quantise_rows(block).scale.t()
        for n in range(0, block.shape[0], TILE):
            assert torch.equal(by_row[n : n + TILE].amax(0), scale[n // TILE])
            for k in range(0, block.shape[1], TILE):
                exact = block[n : n + TILE, k : k + TILE].double() / scale[n // TILE, k // TILE].double()
                expected = exact.clamp(-448, 448).float().to(E4M3)
                assert torch.equal(bytes_of(data[n : n + TILE, k : min(k + TILE, shape[-1])].contiguous()), bytes_of(expected.contiguous()))


@pytest.mark.parametrize("tiling", ["rows", "blocks"])
def test_error_of_a_normal_number_is_at_most_a_sixteenth(tiling: str):
    x = torch.randn(256, 384) * torch.exp2(torch.randint(-8, 8, (256, 1)).float())
    q = ref.quantise_rows(x) if tiling == "rows" else ref.quantise_blocks(x)
    spread = ref.dequantise(Fp8Tensor(torch.ones_like(q.data, dtype=torch.float32).to(E4M3), q.scale, q.columns, q.tiling))
    normal = x.abs() >= spread * 2.0**-6  # E4M3's smallest normal number
    error = ((ref.dequantise(q) - x).abs() / x.abs())[normal]
    assert 0.055 < error.max() <= 2**-4
    assert normal.float().mean() > 0.5
    below = ((ref.dequantise(q) - x).abs() / spread)[~normal]
    assert not below.numel() or below.max() <= 2**-10  # half the smallest subnormal step


def test_dequantised_numbers_quantise_to_themselves():
    for through in (torch.float32, torch.bfloat16):
        x = torch.randn(200, 300) * torch.exp(3 * torch.randn(200, 1))
        for quantise in (ref.quantise_rows, ref.quantise_blocks):
            q = quantise(x)
            again = quantise(ref.dequantise(q, through))
            assert torch.equal(bytes_of(again.data), bytes_of(q.data)) and torch.equal(again.scale, q.scale)


def test_outliers_stay_in_their_tile():
    """Sparse outliers x3000: the share of numbers flushed to zero tells granularities apart (fp8.md)."""
    torch.manual_seed(0)
    x = torch.randn(1024, 1024)
    x.view(-1)[torch.randint(0, x.numel(), (20,))] *= 3000
    flushed = ((ref.dequantise(ref.quantise_rows(x)) == 0) & (x != 0)).float().mean().item()
    per_tensor = ((x / (x.abs().max() / 448)).to(E4M3).float() == 0).float().mean().item()
    assert flushed < 3e-5 and 5e-3 < per_tensor < 2e-2


def test_zero_equal_and_subnormal_tiles():
    x = torch.zeros(4, 256)
    x[1] = -3.25
    x[2] = 1e-40  # a subnormal float32
    x[3, 128:] = 2.0**-130
    q = ref.quantise_rows(x)
    assert ref.dequantise(q).isfinite().all()
    assert torch.equal(ref.dequantise(q)[[0, 1]], x[[0, 1]]) and q.scale[:, 0].eq(2.0**-126).all()
    assert torch.equal(ref.dequantise(q)[3], x[3])
    assert q.non_finite_tiles() == 0


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("power_of_two", [True, False])
def test_a_non_finite_number_marks_its_tile_and_no_other(bad: float, power_of_two: bool):
    x = torch.randn(130, 200)
    x[5, 150] = bad
    rows = ref.quantise_rows(x, power_of_two=power_of_two)
    values = ref.dequantise(rows)
    assert values[5, 128:].isnan().all() and values.isnan().sum() == 72 and rows.non_finite_tiles() == 1
    blocks = ref.quantise_blocks(x, power_of_two=power_of_two)
    values = ref.dequantise(blocks)
    assert values[:128, 128:].isnan().all() and values.isnan().sum() == 128 * 72 and blocks.non_finite_tiles() == 1
    w = ref.quantise_blocks(torch.randn(64, 200))
    y = ref.matmul(rows, w, torch.float32)
    assert y[5].isnan().all() and y.isnan().sum() == 64
    assert not bytes_of(rows.data)[:, 200:].any() and not bytes_of(blocks.data)[:, 200:].any()


def test_float32_scales_are_amax_over_448():
    x = torch.randn(64, 256) * 10
    q = ref.quantise_rows(x, power_of_two=False)
    expected = x.view(64, 2, 128).abs().amax(-1) / 448
    assert torch.equal(q.scale.t(), expected)
    assert torch.equal(bytes_of(q.data), bytes_of((x.view(64, 2, 128) / expected[..., None]).clamp(-448, 448).to(E4M3).view(64, 256)))
    assert 0.02 < relative(ref.dequantise(q), x) < 0.03


def test_transposed_blocks_are_the_blocks_of_the_transpose():
    w = torch.randn(2, 200, 300)
    _, w_t = ref.quantise_blocks_both(w)
    direct = ref.quantise_blocks(w.transpose(-1, -2))
    assert w_t.shape == (2, 300, 200)
    assert torch.equal(bytes_of(w_t.data), bytes_of(direct.data)) and torch.equal(w_t.scale, direct.scale)


def test_retiling_keeps_what_the_new_tile_can_hold():
    x = torch.randn(256, 200) * torch.exp(torch.randn(256, 1))
    q = ref.quantise_rows(x)
    moved = ref.retile(q)
    assert moved.shape == (200, 256)
    before, after = ref.dequantise(q).t(), ref.dequantise(moved)
    spread = moved.scale.t().repeat_interleave(128, 1)
    normal = before.abs() >= spread * 2.0**-6
    assert torch.equal(before[normal], after[normal])
    assert normal.float().mean() > 0.8 and ((before - after).abs() <= spread * 2.0**-10)[~normal].all()


# --- matmuls --------------------------------------------------------------------------------------------------------

SHAPES = [(1, 16, 128), (128, 128, 128), (130, 200, 256), (257, 64, 384), (64, 300, 640), (100, 130, 77)]


@pytest.mark.parametrize("m, n, k", SHAPES)
def test_matmuls_against_float64(m: int, n: int, k: int):
    x, w, dy = torch.randn(m, k), torch.randn(n, k), torch.randn(m, n)
    (xq, xt), (wq, wt) = ref.quantise_rows_both(x), ref.quantise_blocks_both(w)
    dyq, dyt = ref.quantise_rows_both(dy)
    exact = [ref.dequantise(t, torch.float64) for t in (xq, wq, dyq, wt, dyt, xt)]
    cases = [
        (ref.matmul(xq, wq, torch.float32), exact[0] @ exact[1].t()),
        (ref.matmul(dyq, wt, torch.float32), exact[2] @ exact[3].t()),
        (ref.wgrad(dyt, xt), exact[4] @ exact[5].t()),
    ]
    for got, want in cases:
        assert relative(got, want) < 1e-6
    rounded = relative(ref.matmul(xq, wq), cases[0][1])
    assert 5e-4 < rounded < 2.5e-3  # BF16 output: rounded, not float32 in disguise


def test_end_to_end_error_has_two_bounds():
    """Against unquantised float64: a silent BF16 fallback would be .003, a wrong tile far above."""
    torch.manual_seed(1)
    m = n = k = 512
    x, w, dy = torch.randn(m, k), torch.randn(n, k) / math.sqrt(k), torch.randn(m, n) * 1e-3
    (xq, xt), (wq, wt), (dyq, dyt) = ref.quantise_rows_both(x), ref.quantise_blocks_both(w), ref.quantise_rows_both(dy)
    for got, want in [
        (ref.matmul(xq, wq, torch.float32), x.double() @ w.double().t()),
        (ref.matmul(dyq, wt, torch.float32), dy.double() @ w.double()),
        (ref.wgrad(dyt, xt), dy.double().t() @ x.double()),
    ]:
        error = relative(got, want)
        assert 0.030 < error < 0.045 and -20 * math.log10(error) >= 27 and calc_diff(got, want) < 1e-3


def test_long_sums_are_promoted():
    """K = 4096: steps of different size add in FP32 and keep what a BF16 accumulator would lose."""
    x, w = torch.rand(8, 4096) + 0.5, torch.rand(8, 4096) + 0.5
    xq, wq = ref.quantise_rows(x), ref.quantise_blocks(w)
    exact = ref.dequantise(xq, torch.float64) @ ref.dequantise(wq, torch.float64).t()
    assert relative(ref.matmul(xq, wq, torch.float32), exact) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wgrad_adds_to_the_main_gradient(dtype: torch.dtype):
    dyt, xt = ref.quantise_rows(torch.randn(40, 130)), ref.quantise_rows(torch.randn(24, 130))
    out = torch.randn(40, 24).to(dtype)
    want = out.double() + ref.dequantise(dyt, torch.float64) @ ref.dequantise(xt, torch.float64).t()
    pointer = out.data_ptr()
    got = ref.wgrad(dyt, xt, out)
    assert got.data_ptr() == pointer and got.dtype == dtype
    assert relative(got, want) < (1e-6 if dtype == torch.float32 else 2.5e-3)


# --- groups ---------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=6))
def test_layout_of_groups(sizes: list[int]):
    layout = GroupLayout.of(torch.tensor(sizes), sum(sizes))
    assert layout.rows % TILE == 0 and layout.rows >= layout.starts[-1]
    owner = [g for g, size in enumerate(sizes) for _ in range(size)]
    assert layout.positions.numel() == len(set(layout.positions.tolist())) == sum(sizes)
    for token, row in enumerate(layout.positions.tolist()):
        assert layout.tile_group[row // TILE] == owner[token]
    used = sum(-(-size // TILE) for size in sizes)
    assert (layout.tile_group[:used] >= 0).all() and (layout.tile_group[used:] == -1).all()
    tokens = torch.arange(1.0, sum(sizes) + 1)[:, None].repeat(1, 3)
    padded = layout.pad(tokens)
    assert torch.equal(layout.unpad(padded), tokens) and padded.sum() == tokens.sum()


@pytest.mark.parametrize("sizes", [[3, 0, 130], [0, 0, 5], [128, 256, 0], [7]])
def test_grouped_against_float64(sizes: list[int]):
    n, k, tokens = 72, 200, sum(sizes)
    layout = GroupLayout.of(torch.tensor(sizes), tokens)
    x, dy, w = torch.randn(tokens, k), torch.randn(tokens, n), torch.randn(len(sizes), n, k)
    xq, xt = ref.quantise_rows_both(layout.pad(x))
    _, dyt = ref.quantise_rows_both(layout.pad(dy))
    wq = ref.quantise_blocks(w)
    y = ref.grouped_matmul(xq, wq, layout, torch.float32)
    grad = ref.grouped_wgrad(dyt, xt, layout)
    main = torch.ones(len(sizes), n, k)
    ref.grouped_wgrad(dyt, xt, layout, main)
    first = 0
    exact_x, exact_dy = ref.dequantise(xt, torch.float64).t(), ref.dequantise(dyt, torch.float64).t()
    for g, size in enumerate(sizes):
        rows = layout.positions[first : first + size]
        want = ref.dequantise(xq, torch.float64)[rows] @ ref.dequantise(wq, torch.float64)[g].t()
        want_grad = exact_dy[rows].t() @ exact_x[rows]
        if size:
            assert relative(layout.unpad(y)[first : first + size], want) < 1e-6
            assert relative(grad[g], want_grad) < 1e-6 and relative(main[g], want_grad + 1) < 1e-6
        else:
            assert not grad[g].any() and main[g].eq(1).all()
        first += size
    unused = torch.ones(layout.rows, dtype=torch.bool).index_fill(0, layout.positions, False)
    assert not y[unused].any()


def test_refusals_say_what_is_wrong():
    rows, blocks = ref.quantise_rows(torch.randn(4, 200)), ref.quantise_blocks(torch.randn(4, 200))
    other = ref.quantise_blocks(torch.randn(4, 130))
    with pytest.raises(Fp8Error, match="differ: 200 and 130"):
        ref.matmul(rows, other)
    with pytest.raises(Fp8Error, match="takes rows .* by blocks"):
        ref.matmul(blocks, blocks)
    with pytest.raises(Fp8Error, match="takes rows .* by rows"):
        ref.wgrad(rows, blocks)
    with pytest.raises(Fp8Error, match=r"main gradient here is contiguous .*\(4, 4\)"):
        ref.wgrad(rows, rows, torch.zeros(4, 5))
    with pytest.raises(Fp8Error, match="int64"):
        ref.quantise_rows(torch.zeros(4, 4, dtype=torch.int64))
    with pytest.raises(Fp8Error, match="must be torch.float8_e4m3fn"):
        Fp8Tensor(torch.zeros(4, 128), torch.zeros(1, 4), 128, "rows")
    with pytest.raises(Fp8Error, match="200 columns are stored as 256"):
        Fp8Tensor(rows.data[:, :128], rows.scale[:1], 200, "rows")
    with pytest.raises(Fp8Error, match=r"have float32 \(2, 4\)"):
        Fp8Tensor(rows.data, rows.scale.t(), 200, "rows")
    with pytest.raises(Fp8Error, match="sum to 3, but there are 4"):
        GroupLayout.of(torch.tensor([1, 2]), 4)
    layout = GroupLayout.of(torch.tensor([2, 2]), 4)
    with pytest.raises(Fp8Error, match="the layout has"):
        ref.grouped_matmul(rows, ref.quantise_blocks(torch.randn(2, 4, 200)), layout)
    with pytest.raises(Fp8Error, match="quantise the padded matrix"):
        ref.grouped_wgrad(rows, rows, layout)

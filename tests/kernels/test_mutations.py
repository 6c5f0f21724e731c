"""Breaking a kernel on purpose turns its check red: each row is one break, applied to the source of the kernel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from checks import check_grouped, check_matmul, check_promotion, check_quantise, check_wgrad, quantise_inputs
from mutants import mutant
from triton.runtime.errors import InterpreterError

from megalign.kernels import groups, matmul, quantise, reference, wgrad

ONE, TWO, THREE = matmul.CONFIGS[2], matmul.CONFIGS[1], matmul.CONFIGS[0]


def quantised(module: ModuleType) -> None:
    inputs = quantise_inputs()
    for x in inputs:
        check_quantise(module, x)
    for x in (inputs[0], *inputs[3:]):
        check_quantise(module, x, power_of_two=False)


def multiplied(module: ModuleType) -> None:
    check_matmul(module, 130, 330, 384, THREE)
    check_matmul(module, 100, 130, 200, ONE)
    check_promotion(module, TWO)


def multiplied_by_group(module: ModuleType) -> None:
    check_grouped(module, wgrad, [130, 0, 7], 136, 200, (TWO, wgrad.CONFIGS[0]))


def gradient(module: ModuleType) -> None:
    check_wgrad(module, 300, 136, 200, wgrad.CONFIGS[1], torch.randn(136, 200))


def gradient_by_group(module: ModuleType) -> None:
    check_grouped(matmul, module, [130, 0, 7], 136, 200, (TWO, wgrad.CONFIGS[0]))


def referenced(module: ModuleType) -> None:
    """The reference against float64, as test_reference.py does."""
    x, w = torch.randn(130, 384) * torch.exp(torch.randn(130, 1)), torch.randn(200, 384)
    rows, blocks = module.quantise_rows(x), module.quantise_blocks(w)
    exact = x.double() @ w.double().t()
    error = ((module.matmul(rows, blocks, torch.float32) - exact).norm() / exact.norm()).item()
    assert 0.030 < error < 0.045
    again = module.quantise_rows(module.dequantise(rows))
    assert torch.equal(again.data.view(torch.uint8), rows.data.view(torch.uint8))
    tie = module.quantise_rows(torch.full((1, 128), 464.0))
    assert tie.scale[0, 0] == 1


QUANTISE = [
    ("scale one too small", "(bits >> 23) - 8 +", "(bits >> 23) - 9 +"),
    ("threshold 448 instead of 464", "> 0x680000", "> 0x600000"),
    ("threshold excludes 464 itself", "> 0x680000", ">= 0x680000"),
    ("factor is not the scale's inverse", "(254 - e) << 23", "(253 - e) << 23"),
    ("non-finite tiles are not marked", "finite = bits < 0x7F800000", "finite = bits < 0x7FFFFFFF"),
    ("sign is part of the magnitude", "& 0x7FFFFFFF", "& 0xFFFFFFFF"),
    ("smallest scale unclamped", "tl.minimum(tl.maximum(e, 1), 253)", "tl.minimum(e, 253)"),
    ("rows take the column maximum", "tile_scale(tl.max(magnitude_bits(x), 1)", "tile_scale(tl.max(magnitude_bits(x), 0)"),
    ("columns take the row maximum", "tile_scale(tl.max(magnitude_bits(x), 0)", "tile_scale(tl.max(magnitude_bits(x), 1)"),
    ("row scale index", "row_scale_ptr + tile_k.to(tl.int64) * M + m", "row_scale_ptr + m"),
    ("column scale index", "column_scale_ptr + tile_m.to(tl.int64) * K + k", "column_scale_ptr + k"),
    ("columns not transposed", "m[None, :], tl.trans(q)", "m[None, :], q"),
    ("blocks not transposed", "n[None, :], tl.trans(q)", "n[None, :], q"),
    ("transposed block scale index", "(g * tiles_k + tile_k) * tiles_n + tile_n", "(g * tiles_n + tile_n) * tiles_k + tile_k"),
    ("padding of a marked tile not cleared", "tl.where(inside, scaled, 0.0)", "scaled"),
    ("retiled with the scale of its column", "q.to(tl.float32) * scale[:, None]", "q.to(tl.float32) * scale[None, :]"),
    ("FP32 scales over 464", "bitcast=True), 448.0)", "bitcast=True), 464.0)"),
    ("FP32 scales: a marked tile keeps an infinity", 'tl.where(finite, scale, float("nan"))', "scale"),
    ("FP32 scales: smallest scale unclamped", ", 1.1754943508222875e-38)", ", 0.0)"),
    ("last tile row dropped", "grid = (ceil_tiles(m), ceil_tiles(k))\n        outputs", "grid = (max(m // TILE, 1), ceil_tiles(k))\n        outputs"),
]
MATMUL = [
    ("row scale of another step", "x_scale_ptr + k * M + m", "x_scale_ptr + m"),
    ("block scale of another step", "tl.load(scale0 + k)", "tl.load(scale0)"),
    ("second cut takes the first's scale", "tl.load(scale1 + k)", "tl.load(scale0 + k)"),
    ("third cut takes the second's scale", "tl.load(scale2 + k)", "tl.load(scale1 + k)"),
    ("lost promotion: partial sums unscaled", "y0 += partial0 * (x_scale * tl.load(scale0 + k))[:, None]", "y0 += partial0"),
    ("lost promotion: sums in bfloat16", "y0 += partial0 * (x_scale * tl.load(scale0 + k))[:, None]", "y0 = (y0 + partial0 * (x_scale * tl.load(scale0 + k))[:, None]).to(tl.bfloat16).to(tl.float32)"),
    ("last step of K dropped", "tl.cdiv(K, TILE), tl.cdiv(N, TILE)", "(K // TILE), tl.cdiv(N, TILE)"),
    ("last tile row dropped", "tiles_m, tiles_n, all_steps, blocks_n = tl.cdiv(M, BLOCK_M)", "tiles_m, tiles_n, all_steps, blocks_n = (M // BLOCK_M)"),
    ("second cut reads the first's weights", "w_row + first_n + BLOCK_N, k", "w_row + first_n, k"),
    ("each program does one tile", "tiles_m * tiles_n, programs)", "tiles_m * tiles_n, tiles_m * tiles_n)"),
]  # fmt: skip
MATMUL_GROUPED = [
    ("every tile is the first expert's", "w_row = g * N", "w_row = 0"),
    ("scales of the first expert", "w_scales += g * blocks_n * all_steps", "w_scales += 0"),
    ("block rows of an expert rounded down", "w_scales += g * blocks_n * all_steps", "w_scales += g * (N // TILE) * all_steps"),
    ("tiles of no expert are multiplied", "tl.where(g >= 0, all_steps, 0)", "all_steps"),
]
WGRAD = [
    ("gradient scale of another step", "dy_scale_ptr + m * N + n", "dy_scale_ptr + n"),
    ("activation scale of another step", "x_scale_ptr + m * K + c", "x_scale_ptr + c"),
    ("scales swapped", "dy_scale[:, None] * x_scale[None, :]", "dy_scale[None, :] * x_scale[:, None]"),
    ("main gradient overwritten", "if ACCUMULATE:", "if False:"),
    ("last step of tokens dropped", "first, last = 0, tl.cdiv(M, TILE)", "first, last = 0, M // TILE"),
    ("last tile column dropped", "tl.cdiv(K, BLOCK_K)", "(K // BLOCK_K)"),
]
WGRAD_GROUPED = [
    ("every expert sees all tokens up to its end", "first = tl.load(starts_ptr + g) // TILE", "first = 0"),
    ("written to the first expert", "grad_desc.store([g, first_n", "grad_desc.store([0, first_n"),
]
REFERENCE = [
    ("reference: scale one too small", "((bits >> 23) - 8 +", "((bits >> 23) - 9 +"),
    ("reference: threshold 448", "> 0x680000)).clamp", "> 0x600000)).clamp"),
    ("reference: row scale of another step", "a.scale[k][:, None]", "a.scale[0][:, None]"),
    ("reference: last step dropped", "for k in range(a.scale.shape[0])", "for k in range(a.scale.shape[0] - 1)"),
    ("reference: a silent BF16 fallback", "data = _to_e4m3(tiles, scale[..., None], factor[..., None], power_of_two)", "data = _to_e4m3(tiles, scale[..., None], factor[..., None] / 2, power_of_two)"),
]
BREAKS = [
    *((quantised, quantise, *row) for row in QUANTISE),
    *((multiplied, matmul, *row) for row in MATMUL),
    *((multiplied_by_group, matmul, *row) for row in MATMUL_GROUPED),
    *((gradient, wgrad, *row) for row in WGRAD),
    *((gradient_by_group, wgrad, *row) for row in WGRAD_GROUPED),
    *((referenced, reference, *row) for row in REFERENCE),
]


@pytest.mark.filterwarnings("ignore:overflow encountered")  # what some breaks do
@pytest.mark.parametrize("check, module, what, old, new", BREAKS, ids=[f"{row[1].__name__.rsplit('.', 1)[1]}: {row[2]}" for row in BREAKS])
def test_a_broken_kernel_is_noticed(check: Callable[[ModuleType], None], module: ModuleType, what: str, old: str, new: str, tmp_path: Path):
    torch.manual_seed(0)
    broken = mutant(module, tmp_path, old, new)
    with pytest.raises((AssertionError, InterpreterError)):
        check(broken)


@pytest.mark.parametrize("check, module", sorted({(row[0], row[1]) for row in BREAKS}, key=str), ids=lambda v: v.__name__)
def test_the_sound_kernel_passes(check: Callable[[ModuleType], None], module: ModuleType, tmp_path: Path):
    torch.manual_seed(0)
    check(module)
    check(mutant(module, tmp_path, "from __future__ import annotations\n", "from __future__ import annotations\n\n"))


def test_a_broken_layout_of_groups_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    broken = mutant(groups, tmp_path, "ends = ((sizes + TILE - 1) // TILE * TILE).cumsum(0)", "ends = sizes.cumsum(0)")
    import checks

    monkeypatch.setattr(checks, "GroupLayout", broken.GroupLayout)
    with pytest.raises((AssertionError, InterpreterError, IndexError, RuntimeError)):
        multiplied_by_group(matmul)

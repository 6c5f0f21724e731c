"""The FP8 arithmetic in plain torch: what every kernel must reproduce, on any device.

The scale of a tile is a power of two, the smallest 2^e with amax / 2^e <= 464. Numbers up to 464 round to 448, the
largest E4M3 number, so nothing is lost by the threshold and something is gained: quantise(dequantise(q)) == q for
every mantissa, also after a round trip through BF16, and moving a tile to other tiles only changes exponents. (With
448, 1 mantissa in 16 moves.) As integers, b the bits of amax:

    e = clamp((b >> 23) - 8 + ((b & 0x7FFFFF) > 0x680000), 1, 253);   scale = e << 23;   1/scale = (254 - e) << 23

464 = 1.8125 * 2^8, and 0x680000 = .8125 * 2^23. FP32 scales, amax / 448, are for comparison with other stacks.

A matmul walks the contracted dimension in steps of 128: within a step the products are summed as the tensor cores do
it, then the partial sum is scaled and added in FP32. Tensor cores keep about 14 bits over a long sum; without this
promotion the error grows with K (DeepSeek-V3, 3.3.2).

    y[m, n]  = sum_k (sum_{i in step k} x[m, i] w[n, i]) * sx[k, m] * sw[n / 128, k]      1D2D: forward, dgrad
    dw[n, c] = sum_m (sum_{i in step m} dy^T[n, i] x^T[c, i]) * sdy[m, n] * sx[m, c]      1D1D: wgrad
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from megalign.kernels.groups import GroupLayout
from megalign.kernels.tiles import E4M3, E4M3_MAX, TILE, Fp8Error, Fp8Tensor, ceil_tiles, round_up

SMALLEST_SCALE = 2.0**-126


def tile_scale(amax: Tensor, *, power_of_two: bool = True) -> tuple[Tensor, Tensor]:
    """(scale, factor) of tiles with largest magnitude `amax` (FP32): q = x * factor, or x / scale for FP32 scales.

    Both are NaN where amax is not finite. All-zero tiles get the smallest scale, 2^-126.
    """
    nan = torch.full_like(amax, torch.nan)
    if power_of_two:
        bits = amax.view(torch.int32)
        exponent = ((bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x680000)).clamp(1, 253).int()
        scale, factor = (exponent << 23).view(torch.float32), ((254 - exponent) << 23).view(torch.float32)
    else:
        scale = (amax / E4M3_MAX).clamp(min=SMALLEST_SCALE)
        factor = 1 / scale
    finite = amax.isfinite()
    return torch.where(finite, scale, nan), torch.where(finite, factor, nan)


def _to_e4m3(values: Tensor, scale: Tensor, factor: Tensor, power_of_two: bool) -> Tensor:
    scaled = values * factor if power_of_two else values / scale
    # A marked tile is NaN as a whole. The clamp keeps NaN; without it torch before 2.12 turns 449 into NaN.
    return torch.where(scale.isnan(), scale, scaled).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def quantise_rows(x: Tensor, *, power_of_two: bool = True) -> Fp8Tensor:
    """Activations x [M, K] in tiles of 1 x 128 along K. For x^T, hand in x.t(): tiles of 128 x 1 of x."""
    check_input(x, (2,))
    rows, columns = x.shape
    tiles = pad(x.float(), (0, round_up(columns) - columns)).view(rows, ceil_tiles(columns), TILE)
    scale, factor = tile_scale(tiles.abs().amax(-1), power_of_two=power_of_two)
    data = _to_e4m3(tiles, scale[..., None], factor[..., None], power_of_two)
    data = data.view(rows, round_up(columns))
    _clear_padding(data, columns)
    return Fp8Tensor(data, scale.t().contiguous(), columns, "rows")


def quantise_rows_both(x: Tensor, *, power_of_two: bool = True) -> tuple[Fp8Tensor, Fp8Tensor]:
    """(x [M, K] in tiles of 1 x 128, x^T [K, M] in tiles of 1 x 128), each quantised from x itself."""
    return quantise_rows(x, power_of_two=power_of_two), quantise_rows(x.t(), power_of_two=power_of_two)


def quantise_blocks(w: Tensor, *, power_of_two: bool = True) -> Fp8Tensor:
    """Weights w [N, K] or [G, N, K] in blocks of 128 x 128; the blocks at the edges are smaller."""
    check_input(w, (2, 3))
    rows, columns = w.shape[-2:]
    padded = pad(w.float(), (0, round_up(columns) - columns, 0, round_up(rows) - rows))
    tiles = padded.view(*w.shape[:-2], ceil_tiles(rows), TILE, ceil_tiles(columns), TILE)
    scale, factor = tile_scale(tiles.abs().amax((-1, -3)), power_of_two=power_of_two)
    spread = (..., slice(None), None, slice(None), None)
    data = _to_e4m3(tiles, scale[spread], factor[spread], power_of_two).view(padded.shape)
    data = data[..., :rows, :].contiguous()
    _clear_padding(data, columns)
    return Fp8Tensor(data, scale.contiguous(), columns, "blocks")


def _clear_padding(data: Tensor, columns: int) -> None:
    # A marked tile must not spill NaN into the padding: it would meet the zeros of the other operand.
    data.view(torch.uint8)[..., columns:] = 0


def transpose_blocks(w: Fp8Tensor) -> Fp8Tensor:
    """W [.., N, K] -> W^T [.., K, N]: the same bytes and scales, for a block's tile is square."""
    if w.tiling != "blocks":
        raise Fp8Error("transpose_blocks needs 128 x 128 blocks; for rows the other tiles have other scales: retile")
    bytes_ = w.data.view(torch.uint8)[..., : w.columns].transpose(-1, -2)
    data = pad(bytes_, (0, round_up(w.rows) - w.rows)).contiguous().view(E4M3)
    return Fp8Tensor(data, w.scale.transpose(-1, -2).contiguous(), w.rows, "blocks")


def quantise_blocks_both(w: Tensor, *, power_of_two: bool = True) -> tuple[Fp8Tensor, Fp8Tensor]:
    """(W [.., N, K], W^T [.., K, N]) in blocks of 128 x 128: the forward's and dgrad's weight."""
    forward = quantise_blocks(w, power_of_two=power_of_two)
    return forward, transpose_blocks(forward)


def dequantise(q: Fp8Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that `q` stands for, [.., R, C]; exact in float32 and float64, and in bfloat16 for powers of two."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = q.data.to(wide)
    if q.tiling == "rows":
        spread = q.scale.t().repeat_interleave(TILE, -1)
    else:
        spread = q.scale.repeat_interleave(TILE, -1).repeat_interleave(TILE, -2)[..., : q.rows, :]
    return (values * spread.to(wide))[..., : q.columns].to(dtype)


def retile(x: Fp8Tensor) -> Fp8Tensor:
    """x [M, K] in tiles of 1 x 128 -> x^T [K, M] in tiles of 1 x 128, from the FP8 numbers alone.

    With powers of two every number keeps its mantissa, unless it falls under its new tile's smallest normal number.
    """
    if x.tiling != "rows":
        raise Fp8Error("retile needs rows; the transpose of blocks is transpose_blocks")
    return quantise_rows(dequantise(x).t())


def matmul(x: Fp8Tensor, w: Fp8Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """y [M, N] = x [M, K] w[N, K]^T, rows by blocks (1D2D): forward with (x, W), dgrad with (dy, W^T)."""
    check_matmul(x, w)
    by_row = w.scale.repeat_interleave(TILE, 0)[: w.rows].t()  # [K/128, N]
    return _promoted(x, w.data, by_row).to(dtype)


def wgrad(dy_t: Fp8Tensor, x_t: Fp8Tensor, out: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """dW [N, K] = dy^T [N, M] x^T[K, M]^T, rows by rows (1D1D); added to `out` in place, in FP32, if it is given."""
    check_wgrad(dy_t, x_t, out)
    return _accumulate(_promoted(dy_t, x_t.data, x_t.scale), out, dtype)


def _promoted(a: Fp8Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """sum_k (a_k b_k^T) * (sa_k sb_k), k over steps of 128; b_scale [K/128, N]."""
    total = torch.zeros(a.rows, b.shape[0], device=a.device)
    with torch.autocast(a.device.type, enabled=False):  # it would round the partial sums to BF16
        for k in range(a.scale.shape[0]):
            step = slice(k * TILE, (k + 1) * TILE)
            partial = a.data[:, step].float() @ b[:, step].float().t()
            total += partial * (a.scale[k][:, None] * b_scale[k][None, :])
    return total


def _accumulate(grad: Tensor, out: Tensor | None, dtype: torch.dtype) -> Tensor:
    return grad.to(dtype) if out is None else out.copy_(out.float() + grad)


def grouped_matmul(x: Fp8Tensor, w: Fp8Tensor, layout: GroupLayout, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """y [R', N]: the rows of group g of padded x [R', K] times w[g] [N, K]^T; tiles of no group are zeros."""
    check_grouped_matmul(x, w, layout)
    y = torch.zeros(x.rows, w.rows, dtype=dtype, device=x.device)
    starts = layout.starts.tolist()
    for g, (first, last) in enumerate(zip(starts, starts[1:])):
        part = Fp8Tensor(x.data[first:last], x.scale[:, first:last], x.columns, "rows")
        y[first:last] = matmul(part, Fp8Tensor(w.data[g], w.scale[g], w.columns, "blocks"), dtype)
    return y


def grouped_wgrad(
    dy_t: Fp8Tensor, x_t: Fp8Tensor, layout: GroupLayout, out: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """dW [G, N, K], dW[g] = dy^T[:, rows of g] x^T[:, rows of g]^T; an empty group's is zero, or what `out` held."""
    check_grouped_wgrad(dy_t, x_t, layout, out)
    starts = layout.starts.tolist()
    grads = []
    for first, last in zip(starts, starts[1:]):
        part = [Fp8Tensor(t.data[:, first:last], t.scale[first // TILE : last // TILE], last - first, "rows") for t in (dy_t, x_t)]
        grads.append(_promoted(part[0], part[1].data, part[1].scale))
    return _accumulate(torch.stack(grads), out, dtype)


def check_input(x: Tensor, dims: tuple[int, ...]) -> None:
    """Raises Fp8Error unless x is float32, bfloat16 or float16 with one of `dims` dimensions."""
    if x.dim() not in dims or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise Fp8Error(f"cannot quantise {x.dtype} {tuple(x.shape)}; give float32, bfloat16 or float16 with {' or '.join(map(str, dims))} dimensions")


def check_matmul(x: Fp8Tensor, w: Fp8Tensor) -> None:
    """Raises Fp8Error unless x is rows [M, K] and w blocks [N, K]."""
    _check_pair("matmul", x, "rows", w, "blocks", 2)


def check_wgrad(dy_t: Fp8Tensor, x_t: Fp8Tensor, out: Tensor | None) -> None:
    """Raises Fp8Error unless both are rows over the same tokens and `out`, if given, is [N, K]."""
    _check_pair("wgrad", dy_t, "rows", x_t, "rows", 2)
    _check_out((dy_t.rows, x_t.rows), out)


def check_grouped_matmul(x: Fp8Tensor, w: Fp8Tensor, layout: GroupLayout) -> None:
    """Raises Fp8Error unless x is rows [R', K], w blocks [G, N, K], with R' and G of the layout."""
    _check_pair("grouped_matmul", x, "rows", w, "blocks", 3)
    if (x.rows, w.data.shape[0]) != (layout.rows, layout.groups):
        raise Fp8Error(f"grouped_matmul: x has {x.rows} rows and w {w.data.shape[0]} groups; the layout has {layout.rows} and {layout.groups}")


def check_grouped_wgrad(dy_t: Fp8Tensor, x_t: Fp8Tensor, layout: GroupLayout, out: Tensor | None) -> None:
    """Raises Fp8Error unless both are rows over the layout's R' tokens and `out`, if given, is [G, N, K]."""
    _check_pair("grouped_wgrad", dy_t, "rows", x_t, "rows", 2)
    if dy_t.columns != layout.rows:
        raise Fp8Error(f"grouped_wgrad: dy_t has {dy_t.columns} tokens, the layout {layout.rows}; quantise the padded matrix")
    _check_out((layout.groups, dy_t.rows, x_t.rows), out)


def _check_pair(name: str, a: Fp8Tensor, a_tiling: str, b: Fp8Tensor, b_tiling: str, b_dims: int) -> None:
    if (a.tiling, b.tiling) != (a_tiling, b_tiling) or b.data.dim() != b_dims:
        raise Fp8Error(f"{name} takes {a_tiling} [R, C] by {b_tiling} of {b_dims} dimensions; got {a.tiling} {a.shape} and {b.tiling} {b.shape}")
    if a.columns != b.columns:
        raise Fp8Error(f"{name}: {a.shape} and {b.shape} are contracted over their last dimensions, which differ: {a.columns} and {b.columns}")
    if a.device != b.device:
        raise Fp8Error(f"{name}: operands on {a.device} and {b.device}; move one")


def _check_out(shape: tuple[int, ...], out: Tensor | None) -> None:
    if out is not None and (tuple(out.shape) != shape or out.dtype not in (torch.float32, torch.bfloat16) or not out.is_contiguous()):
        raise Fp8Error(f"out is {out.dtype} {tuple(out.shape)} (strides {out.stride()}); a main gradient here is contiguous float32 or bfloat16 {shape}")

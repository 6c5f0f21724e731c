"""AdamW in one pass over memory: a Triton kernel that writes what `adamw.update_torch` would, bit for bit.

Two kernels share the arithmetic. `adamw_flat_kernel` walks any parameter as a vector. `adamw_fp8_kernel` takes one 128 x 128 tile of an
FP8 layer's weight: it updates the tile in slabs of 32 rows (registers hold no more), keeps its largest magnitude, then reads
the BF16 tile that it has just written, from cache, and stores it as E4M3 in both orders with its power-of-two scale.
The FP8 bytes are those of the BF16 parameter, so that a checkpoint of parameters alone gives them again.

Same bits as torch: no fused multiply-add (enable_fp_fusion=False), IEEE division and square root, noise from the same Philox.
The kernel is bound by memory: 20 bytes a weight with BF16 moments and gradients, 22 with FP8.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from megalign.kernels.adamw import Step
from megalign.kernels.launch import launch
from megalign.kernels.quantise import tile_scale, to_e4m3
from megalign.kernels.rounding import Place
from megalign.kernels.tiles import ceil_tiles

BLOCK, FLAT_WARPS = 2048, 8  # elements and warps of a program of adamw_flat_kernel
TILE_WARPS = 16  # of adamw_fp8_kernel: with 8, a thread needs 247 registers
OPTIONS = {"enable_fp_fusion": False}  # of both: a fused multiply-add rounds once where torch rounds twice
SLAB = tl.constexpr(32)  # rows of a tile updated at a time

# Of megalign.kernels.rounding, as a kernel may use them.
_MULTIPLIER = tl.constexpr(0xD256D193)
_WEYL = tl.constexpr(0x9E3779B9)


@triton.jit
def philox(place, step, key):
    """Both words of Philox-2x32-7 of counter (low half of `place`, step) under key + (high half of `place`)."""
    left = place.to(tl.uint32)
    right = tl.zeros_like(left) + step.to(tl.uint32)
    keys = (place >> 32).to(tl.uint32) + key.to(tl.uint32)
    for _ in tl.static_range(7):
        multiplier = tl.full(left.shape, _MULTIPLIER, tl.uint32)
        high = tl.umulhi(left, multiplier)
        low = left * multiplier
        left, right = high ^ keys ^ right, low
        keys = keys + tl.full(keys.shape, _WEYL, tl.uint32)
    return left, right


@triton.jit
def stochastic(value, noise):
    """FP32 whose low 16 bits are zero: `value` rounded up with the probability of the part cut off; see rounding.py."""
    bits = value.to(tl.int32, bitcast=True)
    rounded = ((bits + (noise & 0xFFFF).to(tl.int32)) & -0x10000).to(tl.float32, bitcast=True)
    return tl.where((bits & 0x7F800000) == 0x7F800000, value, rounded)


@triton.jit
def new_moments_and_weight(w, m, v, g, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, size, root_correction):
    m = m * beta1 + g * one_minus_beta1
    v = v * beta2 + g * g * one_minus_beta2
    denominator = tl.sqrt_rn(v) * root_correction + eps
    return w * decay - tl.div_rn(m, denominator) * size, m, v


@triton.jit
def update(
    offsets, mask, place,
    weight_ptr, m_ptr, v_ptr, gradient_ptr, scale,
    beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, size, root_correction, number, key,
    STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Load, step and store `offsets` of master and moments; returns the new FP32 weights."""
    w = tl.load(weight_ptr + offsets, mask=mask, other=0.0)
    m = tl.load(m_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gradient_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * scale
    w, m, v = new_moments_and_weight(w, m, v, g, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, size, root_correction)  # pyright: ignore[reportGeneralTypeIssues]
    if STOCHASTIC:
        noise_m, noise_v = philox(place, number, key)
        if m_ptr.dtype.element_ty == tl.bfloat16:
            m = stochastic(m, noise_m)
        if v_ptr.dtype.element_ty == tl.bfloat16:
            v = stochastic(v, noise_v)
    tl.store(weight_ptr + offsets, w, mask=mask)
    tl.store(m_ptr + offsets, m.to(m_ptr.dtype.element_ty), mask=mask)
    tl.store(v_ptr + offsets, v.to(v_ptr.dtype.element_ty), mask=mask)
    return w


@triton.jit
def adamw_flat_kernel(
    weight_ptr,  # [n] fp32 IN OUT: master
    m_ptr,  # [n] bf16 or fp32 IN OUT
    v_ptr,  # [n] bf16 or fp32 IN OUT
    gradient_ptr,  # [n] any float IN
    parameter_ptr,  # [n] bf16 or fp16 OUT; the master itself where HAS_MASTER is false
    scale_ptr,  # [1] fp32 IN: factor of every gradient
    n, place_offset, columns, row_stride, start,
    beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, size, root_correction, number, key,
    HAS_MASTER: tl.constexpr, STOCHASTIC: tl.constexpr, CONTIGUOUS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    place = offsets + start
    if not CONTIGUOUS:
        place += place // columns * (row_stride - columns)
    w = update(
        offsets, mask, place + place_offset, weight_ptr, m_ptr, v_ptr, gradient_ptr, tl.load(scale_ptr),
        beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, size, root_correction, number, key, STOCHASTIC,
    )  # fmt: skip
    if HAS_MASTER:
        tl.store(parameter_ptr + offsets, w.to(parameter_ptr.dtype.element_ty), mask=mask)


@triton.jit
def adamw_fp8_kernel(
    weight_ptr,  # [G, N, K] fp32 IN OUT: master
    m_ptr,  # [G, N, K] bf16 or fp32 IN OUT
    v_ptr,  # [G, N, K] bf16 or fp32 IN OUT
    gradient_ptr,  # [G, N, K] any float IN
    parameter_ptr,  # [G, N, K] bf16, fp16 or fp32 OUT
    scale_ptr,  # [1] fp32 IN: factor of every gradient
    q_ptr,  # [G, N, K'] e4m3 OUT
    q_scale_ptr,  # [G, N'/128, K'/128] fp32 OUT: power of two of each tile
    qt_ptr,  # [G, K, N'] e4m3 OUT: the transpose
    qt_scale_ptr,  # [G, K'/128, N'/128] fp32 OUT
    N, K, place_offset, row_stride,
    beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, size, root_correction, number, key,
    HAS_MASTER: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    tile_n, tile_k, group = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    tiles_n, tiles_k = tl.cdiv(N, 128), tl.cdiv(K, 128)
    columns = tile_k * 128 + tl.arange(0, 128)
    base = group * N * K
    scale = tl.load(scale_ptr)
    amax_column = tl.zeros((128,), tl.float32)
    for slab in tl.range(0, 128, SLAB):
        rows = (tile_n * 128 + slab + tl.arange(0, SLAB)).to(tl.int64)
        mask = (rows < N)[:, None] & (columns < K)[None, :]
        offsets = base + rows[:, None] * K + columns[None, :]
        place = place_offset + (group * N + rows)[:, None] * row_stride + columns[None, :]
        w = update(
            offsets, mask, place, weight_ptr, m_ptr, v_ptr, gradient_ptr, scale,
            beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, size, root_correction, number, key, STOCHASTIC,
        )  # fmt: skip
        stored = w.to(parameter_ptr.dtype.element_ty)
        if HAS_MASTER:
            tl.store(parameter_ptr + offsets, stored, mask=mask)
        # A NaN must reach the scale: as bits, |NaN| is larger than every number, and tl.max over floats may drop it.
        magnitude = tl.where(mask, tl.abs(stored.to(tl.float32)), 0.0).to(tl.int32, bitcast=True)
        amax_column = tl.maximum(amax_column.to(tl.int32, bitcast=True), tl.max(magnitude, 0)).to(tl.float32, bitcast=True)
    bits = tl.max(amax_column.to(tl.int32, bitcast=True), 0)

    tl.debug_barrier()  # the tile that the threads of this program wrote is now read in another order
    rows = (tile_n * 128 + tl.arange(0, 128)).to(tl.int64)
    inside = (rows < N)[:, None] & (columns < K)[None, :]
    tile = tl.load(parameter_ptr + base + rows[:, None] * K + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    q_scale, factor = tile_scale(bits, True)
    q = to_e4m3(tile, factor, inside, True)
    tl.store(q_ptr + group * N * tiles_k * 128 + rows[:, None] * (tiles_k * 128) + columns[None, :], q, mask=(rows < N)[:, None])
    tl.store(qt_ptr + group * K * tiles_n * 128 + columns[:, None].to(tl.int64) * (tiles_n * 128) + rows[None, :], tl.trans(q), mask=(columns < K)[:, None])
    tl.store(q_scale_ptr + (group * tiles_n + tile_n) * tiles_k + tile_k, q_scale)
    tl.store(qt_scale_ptr + (group * tiles_k + tile_k) * tiles_n + tile_n, q_scale)


def update_triton(parameter: Tensor, gradient: Tensor, state: dict[str, Any], step: Step, scale: Tensor, place: Place) -> None:
    """One step of one parameter, in place, and of its FP8 copy if it has one."""
    has_master = "master" in state
    tensors = (state["master"] if has_master else parameter, state["exp_avg"], state["exp_avg_sq"], gradient, parameter, scale)
    scalars = (
        step.beta1, 1 - step.beta1, step.beta2, 1 - step.beta2, step.eps, step.decay, step.size, step.root_correction, step.number, _signed(step.key),
    )  # fmt: skip
    stochastic = step.stochastic and torch.bfloat16 in (state["exp_avg"].dtype, state["exp_avg_sq"].dtype)
    flags: dict[str, Any] = dict(HAS_MASTER=has_master, STOCHASTIC=stochastic, device=parameter.device, **OPTIONS)
    if not hasattr(parameter, "fp8_weight"):
        n = parameter.numel()
        where = (n, place.offset, place.columns or 1, place.row_stride, place.start)
        launch(adamw_flat_kernel, (-(-n // BLOCK),), *tensors, *where, *scalars, CONTIGUOUS=place.contiguous, BLOCK=BLOCK, num_warps=FLAT_WARPS, **flags)
        increment_version(parameter)  # torch sees no write through a pointer: autograd and the FP8 copy would take the old value for the new
        return
    forward, transposed = parameter.fp8_weight.to_overwrite(parameter)  # pyright: ignore[reportAttributeAccessIssue]
    *groups, rows, columns = parameter.shape
    if not place.contiguous and (place.columns, place.start) != (columns, 0):
        raise ValueError(f"an FP8 weight [.., {rows}, {columns}] has {place}; its columns must be {columns} and its start 0: a flat slice has no tiles of 128 x 128")
    grid = (ceil_tiles(rows), ceil_tiles(columns), groups[0] if groups else 1)
    fp8 = (forward.data, forward.scale, transposed.data, transposed.scale)
    where = (rows, columns, place.offset + place.start, columns if place.contiguous else place.row_stride)
    launch(adamw_fp8_kernel, grid, *tensors, *fp8, *where, *scalars, num_warps=TILE_WARPS, **flags)
    increment_version(parameter)


def _signed(key: int) -> int:
    """The same 32 bits as Triton's int32 holds them: a larger number would change the kernel's signature."""
    return key - 2**32 if key >= 2**31 else key

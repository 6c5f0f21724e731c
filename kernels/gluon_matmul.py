"""FP8 matmul in Gluon, rows by blocks (1D2D), with warps that specialise: the highest rung of the ladder.

    y[m, n] = sum_k (sum_{i in step k} x[m, i] w[n, i]) * sx[k, m] * sw[n / 128, k]          as kernels/matmul.py

Triton's compiler lets every warp do everything: copy, multiply, promote. Here each of three partitions of a program
has one task and waits for the others on barriers in shared memory, so copies never stall the tensor cores:

    producer          1 warpgroup, 40 registers a thread: TMA copies of x and w into a ring of STAGES slots
    consumers 0, 1    4 warps each, 64 rows of the tile: tensor cores, then the promotion of their partial sums

    full[s]    the producer expects the slot's bytes; TMA signals; consumers wait
    empty[s]   each consumer arrives when the tensor cores have read the slot; the producer waits for both

A consumer multiplies its 64 rows with two halves of w and promotes one half while the other is multiplied; the two
consumers are out of step with each other, so one's promotion also runs under the other's multiplication. Results
leave through shared memory by TMA, which drops what lies beyond M and N.

Gluon has no interpreter: this kernel is compiled ahead (tests/golden/kernels_sm90), and on a GPU the tuner compares it
with the reference before it may be chosen. Any M, N, K, as in kernels/matmul.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from megalign.kernels.launch import launch, processors
from megalign.kernels.reference import check_matmul
from megalign.kernels.tiles import TILE, Fp8Tensor, round_up

BLOCK_M = 128  # two consumers of 64 rows, one instruction's height
OPERAND = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
RESULTS = {torch.bfloat16: gl.NVMMASharedLayout(128, 16, 2), torch.float32: gl.NVMMASharedLayout(128, 32, 2)}


class GluonConfig(NamedTuple):
    """A tile of 128 x (2 * half) outputs; half divides 128."""

    half: int
    stages: int


CONFIGS = (GluonConfig(64, 5),)  # two halves of 128 columns spill: the sums alone are 256 registers a thread


@gluon.jit
def producer(x_desc, w_desc, x_slots, w_slots, full, empty, M, N, K, programs, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr):
    tiles_n, steps = gl.cdiv(N, BLOCK_N), gl.cdiv(K, TILE)
    tiles = gl.cdiv(M, BLOCK_M) * tiles_n
    i = 0
    for t in range(gl.program_id(0), tiles, programs):
        for k in range(steps):
            s, phase = i % STAGES, (i // STAGES) & 1
            mbarrier.wait(empty.index(s), phase ^ 1)
            mbarrier.expect(full.index(s), (BLOCK_M + BLOCK_N) * TILE)
            tma.async_copy_global_to_shared(x_desc, [t // tiles_n * BLOCK_M, k * TILE], full.index(s), x_slots.index(s))
            tma.async_copy_global_to_shared(w_desc, [t % tiles_n * BLOCK_N, k * TILE], full.index(s), w_slots.index(s))
            i += 1


@gluon.jit
def consumer(y_desc, x_scale_ptr, w_scale_ptr, x_slots, w_slots, y_slots, full, empty, M, N, K, programs, WHICH: gl.constexpr, BLOCK_M: gl.constexpr, HALF: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr):
    sums: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HALF, 32])  # pyright: ignore[reportArgumentType, reportAssignmentType]
    BLOCK_N: gl.constexpr = 2 * HALF
    tiles_n, steps, blocks_n = gl.cdiv(N, BLOCK_N), gl.cdiv(K, TILE), gl.cdiv(N, TILE)
    tiles = gl.cdiv(M, BLOCK_M) * tiles_n
    nothing = gl.zeros((64, HALF), gl.float32, sums)
    y_slot = y_slots.index(WHICH)
    i = 0
    for t in range(gl.program_id(0), tiles, programs):
        first_m, first_n = t // tiles_n * BLOCK_M + WHICH * 64, t % tiles_n * BLOCK_N
        m = first_m + gl.arange(0, 64, gl.SliceLayout(1, sums))
        scale0 = w_scale_ptr + gl.minimum(first_n // TILE, blocks_n - 1) * steps
        scale1 = w_scale_ptr + gl.minimum((first_n + HALF) // TILE, blocks_n - 1) * steps
        y0 = gl.zeros((64, HALF), gl.float32, sums)
        y1 = gl.zeros((64, HALF), gl.float32, sums)
        for k in range(steps):
            s, phase = i % STAGES, (i // STAGES) & 1
            x_scale = gl.load(x_scale_ptr + k * M + m, mask=m < M, other=0.0)
            factor0, factor1 = x_scale * gl.load(scale0 + k), x_scale * gl.load(scale1 + k)
            mbarrier.wait(full.index(s), phase)
            x = x_slots.index(s).slice(WHICH * 64, 64)
            w = w_slots.index(s)
            partial0 = warpgroup_mma(x, w.slice(0, HALF).permute((1, 0)), nothing, use_acc=False, is_async=True)
            partial0 = warpgroup_mma_wait(0, deps=[partial0])
            partial1 = warpgroup_mma(x, w.slice(HALF, HALF).permute((1, 0)), nothing, use_acc=False, is_async=True)
            y0 += partial0 * gl.expand_dims(factor0, 1)
            partial1 = warpgroup_mma_wait(0, deps=[partial1])
            mbarrier.arrive(empty.index(s), count=1)
            y1 += partial1 * gl.expand_dims(factor1, 1)
            i += 1
        tma.store_wait(0)  # of the tile before: its result has left the slot
        y_slot.slice(0, HALF, dim=1).store(y0.to(y_desc.dtype))
        y_slot.slice(HALF, HALF, dim=1).store(y1.to(y_desc.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(y_desc, [first_m, first_n], y_slot)
    tma.store_wait(0)


@gluon.jit
def gluon_matmul_kernel(
    x_desc,  # [M, K'] e4m3 IN: rows
    w_desc,  # [N, K'] e4m3 IN: blocks
    y_desc,  # [M, N] bf16 or fp32 OUT
    x_scale_ptr,  # [K'/128, M] fp32 IN
    w_scale_ptr,  # [ceil(N/128), K'/128] fp32 IN
    M,
    N,
    K,
    programs,  # how many there are
    BLOCK_M: gl.constexpr,  # 128
    HALF: gl.constexpr,  # half of the tile's columns
    TILE: gl.constexpr,  # 128
    STAGES: gl.constexpr,
):
    x_slots = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_M, TILE], x_desc.layout)
    w_slots = gl.allocate_shared_memory(w_desc.dtype, [STAGES, 2 * HALF, TILE], w_desc.layout)
    y_slots = gl.allocate_shared_memory(y_desc.dtype, [2, 64, 2 * HALF], y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (consumer, (y_desc, x_scale_ptr, w_scale_ptr, x_slots, w_slots, y_slots, full, empty, M, N, K, programs, 0, BLOCK_M, HALF, TILE, STAGES)),
            (consumer, (y_desc, x_scale_ptr, w_scale_ptr, x_slots, w_slots, y_slots, full, empty, M, N, K, programs, 1, BLOCK_M, HALF, TILE, STAGES)),
            (producer, (x_desc, w_desc, x_slots, w_slots, full, empty, M, N, K, programs, BLOCK_M, 2 * HALF, TILE, STAGES)),
        ],
        [4, 4],
        [232, 40],
    )


def matmul(x: Fp8Tensor, w: Fp8Tensor, dtype: torch.dtype = torch.bfloat16, config: GluonConfig = CONFIGS[0]) -> Tensor:
    """y [M, N] = x [M, K] w[N, K]^T; reference.matmul. dtype: bfloat16 or float32."""
    check_matmul(x, w)
    x, w = x.contiguous(), w.contiguous()
    m, n, k = x.rows, w.rows, x.columns
    y = torch.empty(m, round_up(n, 16 // dtype.itemsize), dtype=dtype, device=x.device)
    if k == 0 or y.numel() == 0:
        return y[:, :n].zero_()
    half, stages = config
    descriptors = (
        TensorDescriptor.from_tensor(x.data, [BLOCK_M, TILE], OPERAND),
        TensorDescriptor.from_tensor(w.data, [2 * half, TILE], OPERAND),
        TensorDescriptor(y, [m, n], [y.stride(0), 1], [64, 2 * half], RESULTS[dtype]),
    )
    programs = min(processors(x.device), -(-m // BLOCK_M) * -(-n // (2 * half)))
    launch(
        gluon_matmul_kernel, (programs,), *descriptors, x.scale, w.scale, m, n, k, programs,
        BLOCK_M=BLOCK_M, HALF=half, TILE=TILE, STAGES=stages, num_warps=4, device=x.device,
    )  # fmt: skip
    return y if y.shape[1] == n else y[:, :n].contiguous()

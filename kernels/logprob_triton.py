"""`logprob.py` on CUDA: two Triton kernels around cuBLAS; tested against it bit for meaning, not bit for bit.

Forward, `statistics_kernel`: a program owns 128 tokens and a run of vocabulary tiles. It computes a tile of logits on the tensor
cores, folds it into running maximum, sum and weighted sum (the online softmax of Milakov & Gimelshein, arXiv:1805.02867),
and drops it: logits never leave registers. The runs are then merged, so that few tokens still fill the device.

Backward, `logit_gradients_kernel`: computes the tile again and writes its gradient, in the type of the hidden states, into a buffer
of one chunk of tokens; two ordinary GEMMs turn it into the gradients of hidden states and weight. A kernel that fused these
too would have to add to either with atomics, in no fixed order.

Logits are FP32 from FP32 accumulators here; the CPU path rounds them to the type of the hidden states first, as torch's
matmul does.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalign.kernels.launch import launch, processors
from megalign.kernels.logprob import Statistics, merged
from megalign.kernels.tiles import TILE, ceil_tiles, round_up

BLOCK_ROWS = TILE
# Columns and depth of a tile of logits. FP32 is multiplied on the ordinary cores, from registers: a larger tile would spill.
BLOCKS = {torch.bfloat16: (TILE, 64), torch.float16: (TILE, 64), torch.float32: (64, 32)}
CHUNK_LOGITS = 2**28  # of the buffer of gradients: 512 MB in BF16


@triton.jit
def logits_tile(hidden_ptr, weight_ptr, rows, columns, N, V, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr):
    """FP32 [ROWS, COLUMNS] = hidden[rows] weight[columns]'."""
    logits = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, D, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        inside = (depth < D)[None, :]
        h = tl.load(hidden_ptr + rows[:, None].to(tl.int64) * D + depth[None, :], mask=(rows < N)[:, None] & inside, other=0.0)
        w = tl.load(weight_ptr + columns[:, None].to(tl.int64) * D + depth[None, :], mask=(columns < V)[:, None] & inside, other=0.0)
        logits = tl.dot(h, tl.trans(w), logits, input_precision=PRECISION)
    return logits


@triton.jit
def statistics_kernel(
    hidden_ptr,  # [N, D] IN
    weight_ptr,  # [V, D] IN: this shard
    target_ptr,  # [N] int64 IN: row of this shard, or a number outside [0, V)
    maximum_ptr,  # [splits, N] fp32 OUT
    total_ptr,  # [splits, N] fp32 OUT: sum exp(l - maximum)
    own_ptr,  # [splits, N] fp32 OUT: the target's logit, or 0
    weighted_ptr,  # [splits, N] fp32 OUT: sum exp(l - maximum) (l - maximum), if ENTROPY
    N, V, D, tiles_per_split,
    ENTROPY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    target = tl.load(target_ptr + rows, mask=rows < N, other=-1)
    maximum = tl.full((ROWS,), -1e30, tl.float32)  # finite: its difference to another one stays a number
    total = tl.zeros((ROWS,), tl.float32)
    own = tl.zeros((ROWS,), tl.float32)
    weighted = tl.zeros((ROWS,), tl.float32)
    last = tl.minimum((split + 1) * tiles_per_split, tl.cdiv(V, COLUMNS))
    for tile in range(split * tiles_per_split, last):
        columns = tile * COLUMNS + tl.arange(0, COLUMNS)
        real = (columns < V)[None, :]
        logits = logits_tile(hidden_ptr, weight_ptr, rows, columns, N, V, D, ROWS, COLUMNS, DEPTH, PRECISION)
        new = tl.maximum(maximum, tl.max(tl.where(real, logits, -1e30), 1))
        shift = maximum - new
        scale = tl.exp(shift)
        relative = tl.where(real, logits - new[:, None], 0.0)
        exponentials = tl.where(real, tl.exp(relative), 0.0)
        if ENTROPY:
            weighted = scale * (weighted + shift * total) + tl.sum(exponentials * relative, 1)
        total = scale * total + tl.sum(exponentials, 1)
        own += tl.sum(tl.where(columns[None, :] == target[:, None], logits, 0.0), 1)
        maximum = new
    offsets = split.to(tl.int64) * N + rows
    tl.store(maximum_ptr + offsets, maximum, mask=rows < N)
    tl.store(total_ptr + offsets, total, mask=rows < N)
    tl.store(own_ptr + offsets, own, mask=rows < N)
    if ENTROPY:
        tl.store(weighted_ptr + offsets, weighted, mask=rows < N)


@triton.jit
def logit_gradients_kernel(
    hidden_ptr,  # [N, D] IN: the tokens of a chunk
    weight_ptr,  # [V, D] IN
    target_ptr,  # [N] int64 IN
    log_z_ptr,  # [N] fp32 IN: log sum exp of the whole vocabulary
    g_ptr,  # [N] fp32 IN: upstream of the log-probabilities
    h_ptr,  # [N] fp32 IN: upstream of the entropies, if ENTROPY
    entropy_ptr,  # [N] fp32 IN, if ENTROPY
    gradient_ptr,  # [N, stride] type of hidden OUT
    N, V, D, stride,
    ENTROPY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = rows < N
    logits = logits_tile(hidden_ptr, weight_ptr, rows, columns, N, V, D, ROWS, COLUMNS, DEPTH, PRECISION)
    log_p = logits - tl.load(log_z_ptr + rows, mask=inside, other=0.0)[:, None]
    g = tl.load(g_ptr + rows, mask=inside, other=0.0)[:, None]
    factor = tl.broadcast_to(g, (ROWS, COLUMNS))
    if ENTROPY:
        h = tl.load(h_ptr + rows, mask=inside, other=0.0)[:, None]
        factor += h * (log_p + tl.load(entropy_ptr + rows, mask=inside, other=0.0)[:, None])
    target = tl.load(target_ptr + rows, mask=inside, other=-1)
    gradient = tl.where(columns[None, :] == target[:, None], g, 0.0) - tl.exp(log_p) * factor
    offsets = rows[:, None].to(tl.int64) * stride + columns[None, :]
    tl.store(gradient_ptr + offsets, gradient.to(gradient_ptr.dtype.element_ty), mask=inside[:, None] & (columns < V)[None, :])


def shard_statistics(hidden: Tensor, weight: Tensor, targets: Tensor, *, entropy: bool, keep: bool) -> tuple[Statistics, None]:
    """As `logprob._Torch.shard_statistics`; never keeps a softmax: computing it again costs less than reading it."""
    count, vocabulary = len(targets), weight.shape[0]
    if count == 0 or vocabulary == 0:
        empty = torch.zeros(4, count, device=hidden.device)
        return Statistics(empty[0].fill_(torch.finfo(torch.float32).min), *empty[1:]), None
    constants = _tiles(hidden)
    tiles = -(-vocabulary // constants["COLUMNS"])
    blocks = ceil_tiles(count)
    splits = min(tiles, max(1, 4 * processors(hidden.device) // blocks))
    per_split = -(-tiles // splits)
    splits = -(-tiles // per_split)
    parts = torch.zeros(4, splits, count, device=hidden.device)
    sizes = (count, vocabulary, hidden.shape[1], per_split)
    launch(statistics_kernel, (blocks, splits), hidden.contiguous(), weight.contiguous(), targets, *parts, *sizes, ENTROPY=entropy, device=hidden.device, **constants)
    return merged(Statistics(*parts)), None


def shard_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, log_z: Tensor, g: Tensor, h: Tensor | None, entropies: Tensor,
    *, kept: None, maximum: Tensor, grad_hidden: Tensor | None, grad_weight: Tensor | None,
) -> None:  # fmt: skip
    """As `logprob._Torch.shard_gradients`."""
    count, (vocabulary, depth) = len(targets), weight.shape
    if count == 0 or vocabulary == 0:
        return
    constants = _tiles(hidden)
    stride = round_up(vocabulary, 8)  # rows start on 16 bytes, as the GEMMs after it want them
    size = min(count, max(BLOCK_ROWS, CHUNK_LOGITS // stride // BLOCK_ROWS * BLOCK_ROWS))
    buffer = hidden.new_empty(size, stride)
    hidden, weight, g = hidden.contiguous(), weight.contiguous(), g.contiguous()
    upstream = g if h is None else h.contiguous()
    for start in range(0, count, size):
        rows = slice(start, min(start + size, count))
        n = rows.stop - start
        grid = (ceil_tiles(n), -(-vocabulary // constants["COLUMNS"]))
        of_tokens = (targets[rows], log_z[rows], g[rows], upstream[rows], entropies[rows])
        sizes = (n, vocabulary, depth, stride)
        launch(logit_gradients_kernel, grid, hidden[rows], weight, *of_tokens, buffer, *sizes, ENTROPY=h is not None, device=hidden.device, **constants)
        gradients = buffer[:n, :vocabulary]
        if grad_hidden is not None:
            torch.mm(gradients, weight, out=grad_hidden[rows])
        if grad_weight is not None:
            grad_weight.addmm_(gradients.t(), hidden[rows])


def _tiles(hidden: Tensor) -> dict[str, Any]:
    """FP32 operands are multiplied as such (no TF32): they come from tests and from FP32 training."""
    columns, depth = BLOCKS[hidden.dtype]
    precision = "ieee" if hidden.dtype == torch.float32 else "tf32"
    return {"ROWS": BLOCK_ROWS, "COLUMNS": columns, "DEPTH": depth, "PRECISION": precision, "num_warps": 8, "num_stages": 3}

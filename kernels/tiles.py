"""Block-scaled FP8: the one type that every FP8 kernel reads and writes.

A number is an E4M3 byte times the FP32 scale of its tile. Two tilings exist (DeepSeek-V3, arXiv 2412.19437, 3.3.2):

    rows    activations, gradients   tiles of 1 x 128     an outlier token or channel stays in its own 128 numbers
    blocks  weights                  tiles of 128 x 128   one scale serves a whole GEMM step, and W^T has the same tiles

The tensor cores contract the last dimension of both operands, so the last dimension is always the contracted one, and
it is stored rounded up to 128 with zeros behind the last column: no matmul kernel needs a mask along it, and every row
starts on a 128-byte boundary, as TMA wants it. A transposed copy is a second `Fp8Tensor`, not a view: Hopper has no
fast path for the other order.

    x   [M, K]  rows      data [M, K'], scale [K'/128, M]              forward        y  = x W^T
    x^T [K, M]  rows      data [K, M'], scale [M'/128, K]              wgrad          dW = dy^T x
    W   [N, K]  blocks    data [N, K'], scale [ceil(N/128), K'/128]    forward
    W^T [K, N]  blocks    data [K, N'], scale [ceil(K/128), N'/128]    dgrad          dx = dy W

The scales of rows lie transposed, because a GEMM step reads 128 of them that belong to one tile column.
A tile with an infinity or a NaN in it has a NaN scale, so that all of it reads as NaN (`non_finite_tiles`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

TILE = 128
E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0

Tiling = Literal["rows", "blocks"]


class Fp8Error(ValueError):
    """An FP8 kernel was asked for what it cannot do; the message names the tensor, the value and the rule."""


def ceil_tiles(size: int) -> int:
    """ceil(size / 128)."""
    return -(-size // TILE)


def round_up(size: int, multiple: int = TILE) -> int:
    """The smallest multiple that holds `size`."""
    return -(-size // multiple) * multiple


@dataclass(frozen=True)
class Fp8Tensor:
    """A matrix in block-scaled E4M3; its last dimension is the one a matmul contracts.

    data: [R, C'] float8_e4m3fn, C' = C rounded up to 128, zeros from column C on. Weights of G experts: [G, R, C'].
    scale: FP32; rows: [C'/128, R]; blocks: [ceil(R/128), C'/128], of experts [G, ceil(R/128), C'/128].
    columns: C. tiling: "rows" (1 x 128) or "blocks" (128 x 128).
    value[r, c] = data[r, c] * (scale[c // 128, r] if rows else scale[r // 128, c // 128]).
    Raises Fp8Error if the parts do not fit together.
    """

    data: Tensor
    scale: Tensor
    columns: int
    tiling: Tiling

    def __post_init__(self) -> None:
        if self.data.dtype != E4M3:
            raise Fp8Error(f"Fp8Tensor.data has dtype {self.data.dtype}; it must be {E4M3}")
        if self.data.dim() != 2 and not (self.data.dim() == 3 and self.tiling == "blocks"):
            raise Fp8Error(f"Fp8Tensor.data has shape {tuple(self.data.shape)}; rows: [R, C'], blocks: [R, C'] or [G, R, C']")
        if self.data.shape[-1] != round_up(self.columns):
            raise Fp8Error(f"Fp8Tensor.data has {self.data.shape[-1]} stored columns; {self.columns} columns are stored as {round_up(self.columns)}")
        want = scale_shape(self.data.shape, self.tiling)
        if tuple(self.scale.shape) != want or self.scale.dtype != torch.float32:
            raise Fp8Error(f"Fp8Tensor.scale is {self.scale.dtype} {tuple(self.scale.shape)}; {self.tiling} of {tuple(self.data.shape)} have float32 {want}")

    @property
    def rows(self) -> int:
        return self.data.shape[-2]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix it stands for: the padding is not counted."""
        return (*self.data.shape[:-1], self.columns)

    @property
    def device(self) -> torch.device:
        return self.data.device

    def contiguous(self) -> Fp8Tensor:
        """Itself, or a copy without strides: kernels count on rows and scales that follow each other."""
        if self.data.is_contiguous() and self.scale.is_contiguous():
            return self
        return Fp8Tensor(self.data.contiguous(), self.scale.contiguous(), self.columns, self.tiling)

    def non_finite_tiles(self) -> Tensor:
        """How many tiles held an infinity or a NaN when they were quantised; int64 scalar on the tensor's device."""
        return self.scale.isnan().sum()

    @staticmethod
    def empty(rows: int, columns: int, tiling: Tiling, device: torch.device | str, groups: int | None = None) -> Fp8Tensor:
        """Memory for a kernel to write; the kernel owes the zeros of the padding."""
        shape = (rows, round_up(columns)) if groups is None else (groups, rows, round_up(columns))
        data = torch.empty(shape, dtype=E4M3, device=device)
        scale = torch.empty(scale_shape(data.shape, tiling), dtype=torch.float32, device=device)
        return Fp8Tensor(data, scale, columns, tiling)


def scale_shape(data_shape: tuple[int, ...] | torch.Size, tiling: Tiling) -> tuple[int, ...]:
    """Shape of the scales of stored data [..., R, C']."""
    *groups, rows, stored = data_shape
    return (stored // TILE, rows) if tiling == "rows" else (*groups, ceil_tiles(rows), stored // TILE)

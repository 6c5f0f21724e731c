"""Tokens of several experts in one matrix: each group is padded to whole tiles of 128 rows.

A tile that holds rows of two experts would need two weights in one GEMM step, and its 128 x 1 scales would mix two
weight gradients. So each expert's rows start on a tile, the rest of its last tile is zeros (they add nothing to dW),
and a table says to which expert each tile belongs. All of it is computed on the device: how many tokens an expert got
never has to travel to the host. The padded matrix has room for the worst case, tokens + 127 for each expert; tiles
past the last expert belong to none (-1) and are skipped.

    sizes [3, 0, 130], 133 tokens:   rows 0..127 expert 0 (3 used) | 128..383 expert 2 (130 used) | 384..511 none
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megalign.kernels.tiles import TILE, Fp8Error


@dataclass(frozen=True)
class GroupLayout:
    """Where the rows of G groups lie in the padded matrix.

    starts: [G + 1] int32, first padded row of each group and the end of the last; multiples of 128.
    tile_group: [rows / 128] int32, group of each tile; -1: none.
    positions: [T] int64, padded row of each token, tokens sorted by group.
    rows: R', height of the padded matrix, known without asking the device.
    """

    starts: Tensor
    tile_group: Tensor
    positions: Tensor
    rows: int

    @property
    def groups(self) -> int:
        return self.starts.numel() - 1

    @staticmethod
    def of(sizes: Tensor, tokens: int, device: torch.device | None = None) -> GroupLayout:
        """Layout on `device` (default: that of sizes) of groups with `sizes` [G] rows each (integers >= 0); their sum must be `tokens`.

        Raises Fp8Error for sizes that do not fit, where they lie on the CPU: on a GPU it would have to wait for them.
        """
        if sizes.dim() != 1 or sizes.is_floating_point():
            raise Fp8Error(f"sizes is {sizes.dtype} {tuple(sizes.shape)}; it must be a vector of integers, one for each group")
        if not sizes.is_cuda and (int(sizes.sum()) != tokens or bool((sizes < 0).any())):
            raise Fp8Error(f"sizes {sizes.tolist()} sum to {int(sizes.sum())}, but there are {tokens} tokens; give each group 0 or more, and all of them together")
        groups, sizes = sizes.numel(), sizes.to(device or sizes.device).long()
        rows = (tokens + groups * (TILE - 1)) // TILE * TILE
        ends = ((sizes + TILE - 1) // TILE * TILE).cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends])
        first_of_tile = torch.arange(0, rows, TILE, device=sizes.device)
        group = torch.searchsorted(ends, first_of_tile, right=True)
        shift = starts[:-1] - (sizes.cumsum(0) - sizes)
        positions = torch.arange(tokens, device=sizes.device) + shift.repeat_interleave(sizes, output_size=tokens)
        return GroupLayout(starts.int(), torch.where(group < groups, group, -1).int(), positions, rows)

    def pad(self, tokens: Tensor) -> Tensor:
        """[T, C] sorted by group -> [R', C] with zero rows between the groups; differentiable."""
        return tokens.new_zeros(self.rows, *tokens.shape[1:]).index_copy(0, self.positions, tokens)

    def unpad(self, padded: Tensor) -> Tensor:
        """[R', C] -> [T, C]; the inverse of `pad`."""
        return padded.index_select(0, self.positions)

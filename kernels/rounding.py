"""Stochastic rounding FP32 -> BF16 whose noise is a function of (seed, tensor, step, place in the whole tensor).

BF16 keeps the upper 16 bits of an FP32. Adding a uniform 16-bit number to the lower ones before they are cut rounds up
with the probability of the part cut off, so the mean of many roundings is the value itself: a moving average that moves
by less than half a BF16 step still moves. Round-to-nearest loses every such step.

The noise comes from Philox-2x32 with 7 rounds (Salmon et al., SC 2011, doi 10.1145/2063384.2063405: the fewest that pass
BigCrush), a keyed permutation of a 64-bit counter: no state, no order, nothing to save. The counter is (place, step), the
key a hash of (seed, tensor). `place` counts in the whole parameter, so a shard draws what the whole would have drawn there:
the result does not depend on tensor, pipeline or optimizer sharding, nor on the tiling of a kernel.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

PHILOX_MULTIPLIER = 0xD256D193
PHILOX_WEYL = 0x9E3779B9  # added to the key after each round
PHILOX_ROUNDS = 7
_LOW = 0xFFFFFFFF


@dataclass(frozen=True)
class Place:
    """Where the elements of a shard lie in the whole parameter, in row-major order.

    Element i of the flattened shard is element  offset + (start + i) // columns * row_stride + (start + i) % columns.
    A cut by rows: offset alone. A cut by columns: columns of the shard, row_stride of the whole. A flat slice of either,
    as a distributed optimizer makes it: start as well. columns = 0 means contiguous.
    """

    offset: int = 0
    columns: int = 0
    row_stride: int = 0
    start: int = 0

    @property
    def contiguous(self) -> bool:
        return self.columns == 0 or self.columns == self.row_stride

    def of(self, first: int, count: int, device: torch.device) -> Tensor:
        """int64 [count]: places of elements first .. first + count - 1 of the flattened shard."""
        flat = torch.arange(self.start + first, self.start + first + count, device=device)
        if self.contiguous:
            return flat.add_(self.offset)
        rows = torch.div(flat, self.columns, rounding_mode="floor")
        return rows * (self.row_stride - self.columns) + flat + self.offset


def noise_key(seed: int, name: str) -> int:
    """32-bit Philox key of the tensor `name`: its own, independent stream for every seed."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4).digest(), "little")


def philox(counter: Tensor, second: int, key: int) -> tuple[Tensor, Tensor]:
    """Philox-2x32-7 of counter (low 32 bits of `counter`, `second`) under key + (high 32 bits of `counter`).

    counter: int64 [n]. Returns two int64 [n] holding independent uniform 32-bit numbers.
    """
    keys = (counter >> 32).add_(key).bitwise_and_(_LOW)
    left, right = counter & _LOW, torch.full_like(counter, second & _LOW)
    for _ in range(PHILOX_ROUNDS):
        product = left * PHILOX_MULTIPLIER  # 64 bits; the sign bit is one of them
        left = (product >> 32).bitwise_and_(_LOW).bitwise_xor_(keys).bitwise_xor_(right)
        right = product.bitwise_and_(_LOW)
        keys = keys.add_(PHILOX_WEYL).bitwise_and_(_LOW)
    return left, right


def stochastic_bf16(value: Tensor, noise: Tensor) -> Tensor:
    """BF16 neighbour of `value` (FP32), the upper one with the probability of the part cut off.

    noise: int64 or int32, of which the low 16 bits are used. Values that BF16 holds exactly, infinities and NaN stay.
    """
    bits = value.view(torch.int32) + (noise & 0xFFFF).to(torch.int32)
    rounded = (bits & -0x10000).view(torch.float32)
    return torch.where(value.isfinite(), rounded, value).bfloat16()

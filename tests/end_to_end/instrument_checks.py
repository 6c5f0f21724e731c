"""Runs of `sft` with one slow rank, and with one that runs out of memory."""

from __future__ import annotations

import time
from typing import Any

import sft_checks


def with_a_slow_rank(recipe: dict[str, Any], seconds: float) -> str:
    """The run where the last rank needs `seconds` more for each microbatch's loss."""
    import torch.distributed as dist

    from megalign import sft as module

    original = module.token_loss

    def slow(output: Any, batch: Any) -> Any:
        if dist.get_rank() == dist.get_world_size() - 1:
            time.sleep(seconds)
        return original(output, batch)

    module.token_loss = slow
    try:
        return sft_checks.train(recipe)
    finally:
        module.token_loss = original


def without_memory(recipe: dict[str, Any], call: int) -> tuple[str, list[str]]:
    """The run where every rank's `call`-th loss finds no memory, on a machine that seems to have CUDA; snapshots asked for."""
    import torch

    from megalign import sft as module
    from megalign.trainer import profile

    original, calls, snapshots = module.token_loss, [], []

    class Cuda:
        """What the instruments use of torch.cuda."""

        is_available = staticmethod(lambda: True)

        class memory:
            _record_memory_history = staticmethod(lambda max_entries: snapshots.append(f"history of {max_entries}"))
            _dump_snapshot = staticmethod(snapshots.append)

    class Torch:
        cuda, OutOfMemoryError = Cuda, torch.OutOfMemoryError

    def greedy(output: Any, batch: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        return original(output, batch)

    module.token_loss, profile.torch = greedy, Torch  # pyright: ignore[reportAttributeAccessIssue]
    try:
        return sft_checks.train(recipe), snapshots
    finally:
        module.token_loss, profile.torch = original, torch


def all_of_them(slow: dict[str, Any], greedy: dict[str, Any]) -> tuple[str, tuple[str, list[str]]]:
    """Both, one after the other in the same processes."""
    return with_a_slow_rank(slow, 0.08), without_memory(greedy, 9)

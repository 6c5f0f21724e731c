"""Runs of `sft` in ranks whose disk or clock misbehaves."""

from __future__ import annotations

import errno
import itertools
import os
import time
from typing import Any

import sft_checks


def on_a_slow_disk(recipe: dict[str, Any], seconds: float) -> str:
    """The run where every shard takes `seconds` longer to write."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    write = FileSystemWriterAsync.write_preloaded_data

    def slowly(*args: Any, **kwargs: Any) -> None:
        time.sleep(seconds)
        write(*args, **kwargs)

    FileSystemWriterAsync.write_preloaded_data = staticmethod(slowly)
    try:
        return sft_checks.train(recipe)
    finally:
        FileSystemWriterAsync.write_preloaded_data = staticmethod(write)


def sync_then_slow_async(sync: dict[str, Any], background: dict[str, Any]) -> list[str]:
    """One run after the other in the same processes."""
    return [sft_checks.train(sync), on_a_slow_disk(background, 0.3)]


def with_io_errors(recipe: dict[str, Any], step: int) -> str:
    """The run where the last rank's disk answers EIO to every flush of the checkpoint of `step`."""
    import torch.distributed as dist

    flush = os.fsync

    def broken(descriptor: int) -> None:
        file = os.readlink(f"/proc/self/fd/{descriptor}")
        if dist.get_rank() == dist.get_world_size() - 1 and f"iter_{step:07d}" in file:
            raise OSError(errno.EIO, os.strerror(errno.EIO), file)
        flush(descriptor)

    os.fsync = broken
    try:
        return sft_checks.train(recipe)
    finally:
        os.fsync = flush


def under_a_jumping_clock(recipe: dict[str, Any]) -> str:
    """The run where each look at the wall clock is a day before or after the one before."""
    real, looks = time.time, itertools.count()
    time.time = lambda: real() + 86_400 * (1 if next(looks) % 2 else -1)
    try:
        return sft_checks.train(recipe)
    finally:
        time.time = real


def every_fault(sync: dict[str, Any], background: dict[str, Any], clock: dict[str, Any]) -> list[str]:
    """EIO at step 4 of a run that waits for its saves and of one that does not, each continued; a run with a jumping clock."""
    told = []
    for recipe in (sync, background):
        told += [with_io_errors(recipe, step=4), sft_checks.train(recipe)]
    return [*told, under_a_jumping_clock(clock)]

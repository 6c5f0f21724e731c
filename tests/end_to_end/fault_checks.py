"""Runs of `sft` in ranks whose disk or clock misbehaves."""

from __future__ import annotations

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

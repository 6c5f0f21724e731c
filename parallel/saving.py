"""Writing checkpoints: at once, or by a thread of each rank while training goes on.

Both ways are one: plan together, write alone, finish together.

    plan      who stores which shard (megatron-core), and a copy of what the next step will change    collective
    write     this rank's shards and generators, flushed and hashed                                    a rank alone
    finish    megatron's index, the manifest, one rename                                               collective

Only `write` takes long, and it speaks to no other rank: in the background it runs beside training. The checkpoint
appears with the rename, after every rank has written. Upstream writes in forked processes; a thread needs no fork of
a process full of other threads, and it dies with its rank: nothing of a killed run can write into the folder of the
run that continues it.
"""

from __future__ import annotations

import json
import queue
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalign.parallel.checkpoint import (
    CheckpointError,
    checkpoint_name,
    describe_files,
    files_under,
    flush_folder,
    generators,
    remove,
    remove_leftovers,
    sharded_state,
    together,
    write_manifest,
)
from megalign.parallel.grid import Grid
from megalign.parallel.optimizer import finish_parameters
from megalign.parallel.schedule import any_rank
from megalign.parallel.shadow import Shadow


class Save:
    """The checkpoint of `step` on its way into `folder`: `Save(...).finish()` on all ranks, one at a time.

    extra: called on the writing rank with the unfinished folder, to add files of its own (a tokenizer).
    Both raise CheckpointError on every rank when one could not write; the unfinished folder is removed and no
    other checkpoint is touched.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        chunks: Sequence[Any],
        optimizer: Any | None,
        meta: dict[str, Any],
        grid: Grid,
        extra: Callable[[Path], None] | None = None,
        *,
        background: bool = False,
        shadow: Shadow | None = None,
    ):
        """Plan, and begin to write: with `background` in a thread, else here (collective)."""
        self.grid, self.step = grid, step
        self.final = folder / checkpoint_name(step)
        self.partial = folder / f".{self.final.name}.partial"
        self.mine: dict[str, dict[str, Any]] = {}  # manifest entries of what this rank wrote
        self.results: list[Any] = []
        self.failure: BaseException | None = None
        self.thread: threading.Thread | None = None

        def prepare() -> None:
            remove_leftovers(folder)
            (self.partial / "state").mkdir(parents=True)
            (self.partial / "rng").mkdir()

        def describe() -> None:
            _torch_save(common, self.partial / "state" / "common.pt")
            (self.partial / "meta.json").write_text(json.dumps(meta, indent=1))
            if extra is not None:
                extra(self.partial)

        finish_parameters(chunks)
        try:
            together("create the folder", prepare, grid, only_logger=True)
            common = self._plan(sharded_state(chunks, optimizer, grid, loading=False, shadow=shadow))
            if background:
                self.buckets = together("copy its shards", lambda: _copy(self.buckets), grid)
            self.generators = generators()
            together("write", describe, grid, only_logger=True)
        except CheckpointError as error:
            raise self._failed(error) from None
        if background:
            self.thread = threading.Thread(target=self._write, name="checkpoint-writer", daemon=True)
            self.thread.start()
        else:
            self._write()

    def _plan(self, state: dict[str, Any]) -> Any:
        """Decide who stores what (collective); return what is no tensor and stored once."""
        from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
        from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

        planned = []

        class Plan(TorchDistSaveShardedStrategy):
            """Upstream's strategy up to the point where it would write."""

            def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> AsyncRequest:
                planned.append((writer, save_state_dict_ret[1]))
                return AsyncRequest(None, (), [])

        sharded: Any
        sharded, common = save_preprocess(state)
        Plan("torch_dist", 1).async_save(sharded, self.partial / "state")
        self.writer, self.index = planned[0]
        self.buckets = self.writer.write_buckets
        return common

    def _write(self) -> None:
        """This rank's files. It must not communicate: the main thread does."""
        try:
            for i, (file, _, _) in enumerate(self.buckets):
                outcomes, counted = queue.SimpleQueue(), queue.Queue()
                counted.put(i)
                self.writer.write_preloaded_data([self.writer.transforms], i, self.buckets[i], outcomes, counted, use_fsync=True)
                _, outcome = outcomes.get()
                if isinstance(outcome, BaseException):
                    raise outcome
                self.results += outcome
                self._describe(Path(file))
            file = self.partial / "rng" / f"rank_{self.grid.rank:05d}.pt"
            _torch_save(self.generators, file)
            self._describe(file)
        except BaseException as error:  # finish() raises it on all ranks
            self.failure = error

    def _describe(self, file: Path) -> None:
        self.mine |= describe_files(self.partial, [str(file.relative_to(self.partial))])

    def done(self) -> bool:
        """True on all ranks once every rank has written its files (collective)."""
        return not any_rank(self.thread is not None and self.thread.is_alive(), self.grid)

    def finish(self) -> Path:
        """Wait for this rank's files, then put the checkpoint in place (collective); return its path.

        Raises CheckpointError on every rank when one could not write.
        """
        from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

        if self.thread is not None:
            self.thread.join()

        def written() -> None:
            if self.failure is not None:
                raise self.failure

        def put_in_place() -> None:
            self.writer.finish(self.index, [results for results, _ in parts])
            save_config(CheckpointingConfig("torch_dist", 1), str(self.partial / "state"))
            files = {name: entry for _, described in parts for name, entry in described.items()}
            files |= describe_files(self.partial, [name for name in files_under(self.partial) if name not in files])
            write_manifest(self.partial, dict(sorted(files.items())))
            describe_files(self.partial, ["manifest.json"])
            for path in [*(p for p in self.partial.rglob("*") if p.is_dir()), self.partial]:
                flush_folder(path)
            if self.final.exists():
                remove(self.final)
            self.partial.rename(self.final)
            flush_folder(self.final.parent)

        try:
            together("write", written, self.grid)
            parts: list[Any] = [None] * self.grid.world
            dist.all_gather_object(parts, (self.results, self.mine))
            together("finish", put_in_place, self.grid, only_logger=True)
        except CheckpointError as error:
            raise self._failed(error) from None
        return self.final

    def _failed(self, error: CheckpointError) -> CheckpointError:
        if self.grid.is_logger:
            shutil.rmtree(self.partial, ignore_errors=True)
        return CheckpointError(f"checkpoint of step {self.step} was not written: {error}. Earlier checkpoints are intact")


def _torch_save(content: Any, file: Path) -> None:
    """Through Python's file: torch's own does not say why the system refused to write."""
    with file.open("wb") as stream:
        torch.save(content, stream)


def _copy(buckets: list[Any]) -> list[Any]:
    """The same shards in memory of their own, on the CPU: the next optimizer step changes the originals in place."""
    return [
        (file, key, (objects, [(item, tensor.to("cpu", copy=True)) for item, tensor in tensors])) for file, key, (objects, tensors) in buckets
    ]

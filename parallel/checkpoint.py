"""Checkpoints that are complete or absent.

A checkpoint is written beside its place (`.iter_0000100.partial`), every file is hashed and flushed to the
disk, a manifest names them all, and one rename puts the folder in place (`saving.py`). A reader therefore sees
either nothing or everything; what later loses a byte is refused with the file's name.

Model and optimizer are stored by megatron-core's dist_checkpointing under global names, so that another
layout can load them. Generators are stored a rank, for bitwise resumption on the same layout.

    iter_0000100/
        manifest.json       {"format": ..., "files": {name: {"bytes", "sha256"}}}
        meta.json           what the caller wants to remember (step, data position, recipe, ...)
        state/              megatron-core's sharded tensors
        rng/rank_00000.pt
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalign.parallel.grid import Grid
from megalign.parallel.optimizer import create_states, load_optimizer, sharded_optimizer
from megalign.parallel.shadow import Shadow, requested_average, sharded_average

FORMAT = "megalign-checkpoint-2"
_NAME = re.compile(r"iter_(\d{7,})")


class CheckpointError(Exception):
    """A checkpoint cannot be read or written; the message names the file and what can be done."""


# -- folders and manifests: plain files, no ranks -------------------------------------------------------


def checkpoint_name(step: int) -> str:
    """The folder of a step: `iter_0000100`."""
    return f"iter_{step:07d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, oldest first. What was cut off while writing is not listed."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and (path / "manifest.json").exists()]
    return sorted(found, key=lambda path: int(path.name.split("_")[1]))


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint. It disappears in one step, so that a removal cut short leaves none that looks complete."""
    condemned = checkpoint.with_name(f".{checkpoint.name}.removed")
    shutil.rmtree(condemned, ignore_errors=True)
    checkpoint.rename(condemned)
    shutil.rmtree(condemned, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed runs left half-written or half-removed. No save may be under way."""
    for path in folder.glob(".iter_*"):
        shutil.rmtree(path, ignore_errors=True)


def write_manifest(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Write manifest.json for `files` (see `describe_files`)."""
    (folder / "manifest.json").write_text(json.dumps({"format": FORMAT, "files": files}, indent=1))


def describe_files(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file, and every file flushed to the disk."""
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": _hash(folder / name, flush=True)} for name in names}


def verify(checkpoint: Path, names: Sequence[str] | None = None) -> None:
    """Raise CheckpointError naming the first file that is missing, truncated, corrupted or foreign.

    names: the files to read through; default all. Missing files are always found.
    """
    manifest_file = checkpoint / "manifest.json"
    try:
        manifest = json.loads(manifest_file.read_text())
        files = manifest["files"]
        if manifest["format"] != FORMAT:
            raise ValueError(f"its format is {manifest['format']!r}, expected {FORMAT!r}")
    except FileNotFoundError:
        raise CheckpointError(f"{manifest_file} does not exist: {checkpoint} is no megalign checkpoint") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{manifest_file} cannot be read: {error}") from None
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, its manifest says {expected['bytes']}: truncated")
    for name in files if names is None else names:
        if _hash(checkpoint / name) != files[name]["sha256"]:
            raise CheckpointError(f"{checkpoint / name} does not have the SHA-256 of its manifest: corrupted")


def previous_good(checkpoint: Path) -> Path | None:
    """The newest older checkpoint beside this one that passes `verify`."""
    for path in reversed(list_checkpoints(checkpoint.parent)):
        if path.name < checkpoint.name:
            try:
                verify(path)
            except CheckpointError:
                continue
            return path
    return None


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """What the writer remembered. Raises CheckpointError if the folder is no checkpoint."""
    try:
        return json.loads((checkpoint / "meta.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint / 'meta.json'} cannot be read ({error}): is {checkpoint} a checkpoint folder?") from None


def _hash(path: Path, flush: bool = False) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
        if flush:
            os.fsync(file.fileno())
    return digest.hexdigest()


def flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def files_under(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")


# -- loading, and what saving shares with it: collective ------------------------------------------------


def load(
    checkpoint: Path,
    chunks: Sequence[Any],
    optimizer: Any | None,
    grid: Grid,
    *,
    same_generators: bool = False,
    shadow: Shadow | None = None,
    average: bool = False,
) -> dict[str, Any]:
    """Load a checkpoint of any layout into the model, and the optimizer if given (collective); return its meta.

    shadow: is loaded too; begins at the loaded weights where the checkpoint has none. average: the model's weights are to be
    the average (train.ema_decay) and not what was trained last.
    same_generators: restore each rank's random generators too (needs the layout that saved).
    Raises CheckpointError naming the damaged file, and the newest good checkpoint before it.
    """
    from megatron.core import dist_checkpointing

    from megalign.parallel.lora import has_adapters

    verify_together(checkpoint, grid)
    if optimizer is not None:
        create_states(optimizer)
    stored = set(dist_checkpointing.load_tensors_metadata(str(checkpoint / "state"))) if shadow is not None or average else set()
    has_average = any(key.startswith("ema.") for key in stored)
    if average and not has_average:
        raise CheckpointError(f"{checkpoint} has no averaged weights: its run had no train.ema_decay; set train.eval_ema to false")
    wanted = sharded_state(chunks, optimizer, grid, loading=True, shadow=shadow if has_average else None)
    names = {f"ema{i}": {name: entry.data for name, entry in wanted[f"model{i}"].items()} for i in range(len(chunks))}  # loading fills other tensors
    if average:
        wanted |= {f"ema{i}": requested_average(wanted[f"model{i}"], stored) for i in range(len(chunks))}
    state: Any = dist_checkpointing.load(wanted, str(checkpoint / "state"))
    for i, chunk in enumerate(chunks):
        # The base of adapters is not in the checkpoint. That all that was wanted is there, megatron's load has checked.
        _unwrap(chunk).load_state_dict(state[f"model{i}"], strict=not has_adapters(chunk))
    if optimizer is not None:
        load_optimizer(optimizer, state["optimizer"])
    if shadow is not None and not has_average:
        shadow.restart()
    for part in (part for part in names if part in state):
        for name, full in state[part].items():
            if shadow is not None:
                shadow.set_whole(names[part][name], full)
            if average:
                names[part][name].data.copy_(full)
    if same_generators:
        _set_generators(torch.load(checkpoint / "rng" / f"rank_{grid.rank:05d}.pt", weights_only=True))
    return read_meta(checkpoint)


def load_model(checkpoint: Path, chunks: Sequence[Any], grid: Grid, *, may_lack: Callable[[str], bool], average: bool = False) -> None:
    """Load a checkpoint's weights as the start of another model (collective): what that has no place for is left out.

    may_lack(name): a weight that keeps the value it has where the checkpoint has none of this name and shape. average: the
    average that the checkpoint holds, not what was trained last.
    Raises CheckpointError as `load` does, and for any other weight that is missing.
    """
    from megatron.core import dist_checkpointing

    verify_together(checkpoint, grid)
    stored = {name: tuple(entry.global_shape) for name, entry in dist_checkpointing.load_tensors_metadata(str(checkpoint / "state")).items()}
    wanted = sharded_state(chunks, None, grid, loading=True)
    missing: list[str] = []
    for part in wanted.values():
        for name, entry in list(part.items()):
            shape = entry.global_shape if isinstance(entry, dist_checkpointing.ShardedTensor) else None  # else of no weight
            if may_lack(name) and stored.get(name) != shape:
                del part[name]
            elif shape is not None and entry.key not in stored:
                missing.append(name)

    def complain() -> None:
        if missing:
            raise CheckpointError(f"{checkpoint} has no {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}: its model is another")

    together("read", complain, grid)
    names = {f"ema{i}": {name: entry.data for name, entry in wanted[f"model{i}"].items()} for i in range(len(chunks))}  # loading fills other tensors
    if average:
        wanted |= {f"ema{i}": requested_average(wanted[f"model{i}"], set(stored)) for i in range(len(chunks))}
    state: Any = dist_checkpointing.load(wanted, str(checkpoint / "state"))
    for i, chunk in enumerate(chunks):
        _unwrap(chunk).load_state_dict(state[f"model{i}"], strict=False)
        for name, full in state.get(f"ema{i}", {}).items():
            names[f"ema{i}"][name].data.copy_(full)


def verify_together(checkpoint: Path, grid: Grid) -> None:
    """Every rank reads a share of the files (collective). Raises CheckpointError, with the newest good checkpoint before it."""

    def check() -> None:
        names = sorted(json.loads((checkpoint / "manifest.json").read_text())["files"]) if (checkpoint / "manifest.json").exists() else []
        verify(checkpoint, names[grid.rank :: grid.world])

    try:
        together("read", check, grid)
    except CheckpointError as error:
        good = previous_good(checkpoint)
        advice = f"the last good checkpoint before it is {good}: move {checkpoint} away and repeat the command to continue from there" if good else "there is no good checkpoint before it"
        raise CheckpointError(f"{error}; {advice}") from None


def sharded_state(chunks: Sequence[Any], optimizer: Any | None, grid: Grid, *, loading: bool, shadow: Shadow | None = None) -> dict[str, Any]:
    metadata = {
        # Every layer under its own name: layers may differ (frozen ones, leading dense ones), and upstream is giving up stacking.
        "non_homogeneous_layers": True,
        "dp_cp_group": grid.data_context.group,
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
    }
    state: dict[str, Any] = {f"model{i}": _stored(_unwrap(chunk), metadata) for i, chunk in enumerate(chunks)}
    if optimizer is not None:
        models = {key: value for part in state.values() for key, value in part.items()} if len(chunks) == 1 else state
        state["optimizer"] = sharded_optimizer(optimizer, models, loading=loading, metadata=metadata)
    if shadow is not None:
        state |= {f"ema{i}": sharded_average(shadow, state[f"model{i}"], loading=loading) for i in range(len(chunks))}
    return state


def _stored(chunk: Any, metadata: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds of a chunk: all, or of a model with adapters these and what is trained beside them."""
    from megalign.parallel.lora import has_adapters, is_adapter

    state = chunk.sharded_state_dict(metadata=metadata)
    if not has_adapters(chunk):
        return state
    return {name: entry for name, entry in state.items() if is_adapter(name) or getattr(entry.data, "requires_grad", False)}


def _unwrap(chunk: Any) -> Any:
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def generators() -> dict[str, Any]:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    tracker: Any = get_cuda_rng_tracker()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else torch.empty(0, dtype=torch.uint8)
    return {"torch": torch.get_rng_state(), "cuda": cuda, "tracker": tracker.get_states()}


def _set_generators(state: dict[str, Any]) -> None:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"].numel():
        torch.cuda.set_rng_state(state["cuda"])
    tracker: Any = get_cuda_rng_tracker()
    tracker.set_states(state["tracker"])


def together(doing: str, work: Callable[[], Any], grid: Grid, *, only_logger: bool = False) -> Any:
    """Do `work` (on one rank or all) and fail on all ranks if it failed on one, with that rank's reason."""
    result, failure = None, None
    if grid.is_logger or not only_logger:
        try:
            result = work()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # whatever it was (torch's CheckpointException is no Exception), all must hear of it
            failure = str(error) if isinstance(error, CheckpointError) else f"rank {grid.rank} could not {doing}: {_reason(error)}"
    failures: list[str | None] = [None] * grid.world
    dist.all_gather_object(failures, failure)
    told = [text for text in failures if text is not None]
    if told:
        raise CheckpointError(max(told, key=lambda text: "Errno" in text))  # an operating system's reason says most
    return result


def _reason(error: BaseException) -> str:
    """What went wrong: the operating system's word if it is behind the error, and no traceback.

    Where the disk is full, torch's zip writer raises `unexpected pos 704 vs 598` over it.
    """
    behind: BaseException | None = error
    while behind is not None:
        if isinstance(behind, OSError):
            return str(behind)
        behind = behind.__cause__ or behind.__context__
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

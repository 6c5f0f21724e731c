"""Does a folder keep the promises that checkpoints, caches and logs rest on? First for one process, then between ranks.

Complete-or-absent checkpoints need an atomic rename; caches built once need exclusive creation and locks; data files
are memory-mapped; resumption on another node needs one node to see what another wrote.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megalign.doctor.findings import Finding

SECONDS_TO_APPEAR = 5.0
NAMES = 20  # that all ranks try to create at once


def folder_findings(folder: Path, *, min_free_gb: float) -> list[Finding]:
    """What one process can see: free space, rename, exclusive creation, locks, memory maps, the server's clock."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _own_folder(folder) as here:
            usage = shutil.disk_usage(here)
            short = usage.free < min_free_gb * 1e9
            space = Finding("folder", "free space", f"{usage.free / 1e9:,.1f} of {usage.total / 1e9:,.1f} GB in {folder}", "broken" if short else "ok", f"less than {min_free_gb:g} GB: free some, or choose another folder" if short else "")
            return [space, *(_probe(name, work, here) for name, work in _PROBES.items())]
    except OSError as error:
        return [Finding("folder", "write", f"{folder}: {error.strerror or error}", "broken", "choose a folder that you may write to")]


def rename(here: Path) -> str:
    """A file, and a folder of files, replaced in one step."""
    (here / "new").write_text("new")
    (here / "old").write_text("old")
    os.replace(here / "new", here / "old")
    _must((here / "old").read_text() == "new" and not (here / "new").exists(), "a replaced file kept its old content")
    (here / "partial").mkdir()
    (here / "partial" / "file").write_text("x")
    os.rename(here / "partial", here / "final")
    _must((here / "final" / "file").read_text() == "x" and not (here / "partial").exists(), "a renamed folder is still under its old name")
    return "replaces files and folders in one step"


def exclusive_creation(here: Path) -> str:
    """Of two creators of one name, one is refused."""
    os.close(os.open(here / "once", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    try:
        os.close(os.open(here / "once", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return "a name is created once"
    raise OSError("the same name could be created twice")


def lock(here: Path) -> str:
    """A lock held through one open file is refused through another."""
    with open(here / "lock", "w") as first, open(here / "lock", "w") as second:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _must(not _can_lock(second), "two holders of one exclusive lock")
    return "exclusive"


def memory_map(here: Path) -> str:
    """A file read through a map is the file."""
    content = os.urandom(mmap.PAGESIZE * 3 + 17)
    (here / "mapped").write_bytes(content)
    with open(here / "mapped", "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        _must(view[:] == content, "the map does not hold the file's content")
    return "reads what was written"


def server_clock(here: Path) -> str:
    """The time a file carries is the time here (a file server has its own clock)."""
    (here / "now").write_text("")
    ahead = (here / "now").stat().st_mtime - time.time()
    _must(abs(ahead) < 5, f"the file server's clock is {ahead:+.0f} s from ours")
    return f"{ahead:+.2f} s from ours"


_PROBES: dict[str, Callable[[Path], str]] = {"rename": rename, "O_EXCL": exclusive_creation, "flock": lock, "mmap": memory_map, "file times": server_clock}
_FIXES = {
    "rename": "an object store behind FUSE? keep runs on a real file system",
    "O_EXCL": "NFSv2? mount NFSv3 or newer",
    "flock": "Lustre: mount with -o flock; NFS: not with -o nolock",
    "mmap": "FUSE: mount without direct_io; or copy the data to a local disk",
    "file times": "run chrony or ntpd on the server and here",
}


def shared_findings(folder: Path, rank: int, world: int, where: str) -> list[Finding]:
    """What only several ranks can see (collective; equal on all). where: this rank's name in a message."""
    names: list[Any] = [uuid.uuid4().hex]
    dist.broadcast_object_list(names, 0)
    here, token = folder / f".megalign-doctor-{names[0]}", names[0]
    failure = None
    if rank == 0:
        try:
            here.mkdir(parents=True)
            (here / "partial").mkdir()
            (here / "partial" / "token").write_text(token)
            os.rename(here / "partial", here / "final")
        except OSError as error:
            failure = error.strerror or str(error)
    if failures := _told(failure, world):
        return [Finding("folder", "between ranks", f"rank 0 cannot write to {folder}: {failures[0]}", "broken", "choose a folder that you may write to")]
    seconds = _seconds_until_seen(here / "final" / "token", token)
    reasons = _told(None if seconds is not None else f"{where} does not see it after {SECONDS_TO_APPEAR:g} s", world)
    if reasons:
        found = [Finding("folder", "between ranks", f"what rank 0 wrote to {folder}: {'; '.join(reasons[:3])}", "broken", "a folder of one node only? choose one on the shared file system")]
    else:
        found = [_visible(seconds or 0.0, world), _one_creator(here, rank, world), _one_holder(here, rank, world)]
    dist.barrier()
    if rank == 0:
        shutil.rmtree(here, ignore_errors=True)
    return found


def _visible(seconds: float, world: int) -> Finding:
    every: list[Any] = [None] * world
    dist.all_gather_object(every, seconds)
    slow = max(every) > 1.0
    return Finding("folder", "between ranks", f"a renamed folder is seen by all {world} ranks after {max(every):.2f} s", "warning" if slow else "ok", "attribute caching: mount with a smaller actimeo" if slow else "")


def _one_creator(here: Path, rank: int, world: int) -> Finding:
    won = []
    dist.barrier()
    for number in range(NAMES):
        with contextlib.suppress(FileExistsError):
            os.close(os.open(here / f"race{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            won.append(number)
    every: list[Any] = [None] * world
    dist.all_gather_object(every, won)
    winners = [sum(number in mine for mine in every) for number in range(NAMES)]
    good = winners == [1] * NAMES
    return Finding("folder", "O_EXCL between ranks", f"{NAMES} names, one creator each" if good else f"names with other than one creator: {sum(n != 1 for n in winners)} of {NAMES}", "ok" if good else "broken", "" if good else _FIXES["O_EXCL"])


def _one_holder(here: Path, rank: int, world: int) -> Finding:
    reason = None
    with open(here / "lock", "a") as file:
        try:
            if rank == 0:
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            reason = f"rank 0: {error.strerror}"
        dist.barrier()
        if rank != 0 and _can_lock(file):
            reason = f"rank {rank} got the lock that rank 0 holds"
        reasons = _told(reason, world)
    return Finding("folder", "flock between ranks", reasons[0] if reasons else "one holder", "broken" if reasons else "ok", _FIXES["flock"] if reasons else "")


def _told(mine: str | None, world: int) -> list[str]:
    every: list[Any] = [None] * world
    dist.all_gather_object(every, mine)
    return [text for text in every if text]


def _seconds_until_seen(path: Path, content: str) -> float | None:
    started = time.monotonic()
    while time.monotonic() - started < SECONDS_TO_APPEAR:
        try:
            if path.read_text() == content and not path.parent.with_name("partial").exists():
                return time.monotonic() - started
        except OSError:
            pass
        time.sleep(0.01)
    return None


def _can_lock(file: Any) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _probe(name: str, work: Callable[[Path], str], here: Path) -> Finding:
    try:
        return Finding("folder", name, work(here))
    except (OSError, ValueError) as error:
        return Finding("folder", name, str(getattr(error, "strerror", None) or error), "broken", _FIXES[name])


def _must(condition: bool, otherwise: str) -> None:
    if not condition:
        raise OSError(otherwise)


@contextlib.contextmanager
def _own_folder(folder: Path) -> Iterator[Path]:
    here = folder / f".megalign-doctor-{uuid.uuid4().hex}"
    here.mkdir()
    try:
        yield here
    finally:
        shutil.rmtree(here, ignore_errors=True)

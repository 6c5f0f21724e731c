"""Something on disk that many processes need and one of them makes, on file systems that are shared and slow to agree.

    entry = build_once(folder, "tokens-3f2a", build)      # on every rank of every node

Only what NFS, Lustre and a local disk all do atomically is used: `mkdir` fails where the name exists, and
`rename` of a folder shows all of it or nothing. There is no flock, and no clock is compared with another's.

    KEY.lock-1/         made by the process that builds; its `beat` is a counter that a thread raises
    KEY.part-TOKEN/     that process alone writes here; renamed to KEY when it is whole
    KEY.failed          why the last builder failed, for those that waited on it
    KEY/                the entry: complete, and never changed

A builder that is killed leaves a lock whose counter stands still. Who has watched it stand still for
`stale_after` of its own seconds makes KEY.lock-2: of many that try, mkdir lets one through, and no lock is ever
taken away from anybody. A builder that only slept and wakes up again does no harm: its folder is its own, and
its rename fails once the entry is there. On the builder's own host, death is seen at once in /proc.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megalign.data.rows import DataError

STALE_AFTER = 60.0  # seconds without a beat, seen by one watcher; NFS may hide a change for some of them
BEAT = 2.0  # seconds
POLL = 0.2
SAY_AFTER = 5.0  # a short wait is no news

Say = Callable[[str], None]


def _silent(_: str) -> None:
    pass


def build_once(
    folder: Path,
    key: str,
    build: Callable[[Path], None],
    *,
    say: Say = _silent,
    timeout: float = 7200.0,
    stale_after: float = STALE_AFTER,
) -> Path:
    """The entry `folder / key`; where it is missing, one process lets `build` fill a new folder and the others wait.

    `build(part)` writes and flushes its files in `part`. What it raises is raised here, and as DataError by those
    that waited on it. Also raises DataError after `timeout` seconds of waiting, and where `folder` cannot be used.
    """
    final = folder / key
    if final.is_dir():
        _renew(final)
        return final
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"data.cache_dir: {folder} cannot be made ({error}); name a folder that can be written") from error
    deadline, watched = time.monotonic() + timeout, _Watch()
    while True:
        locks = _locks(folder, key)  # listing the folder also refreshes what NFS believes of its names
        if final.is_dir():
            return final
        if not locks or watched.is_stale(folder / locks[-1], stale_after):
            number = 1 + (int(locks[-1].rpartition("-")[2]) if locks else 0)
            if token := _acquire(folder / f"{key}.lock-{number}"):
                if number > 1:
                    say(f"the process that was making {final} is gone; making it again")
                return _build(folder, key, build, token)
            continue
        if not watched.announced and time.monotonic() - watched.began > SAY_AFTER:
            watched.announced = True
            say(f"waiting for {watched.owner}, which is making {final}")
        time.sleep(POLL)
        if watched.token and not (folder / locks[-1]).is_dir() and not final.is_dir():
            _raise_failure(folder / f"{key}.failed", watched.token)
        if time.monotonic() > deadline:
            raise DataError(
                f"data.cache_dir: waited {timeout:.0f} s for {watched.owner}, which is making {final}; see what it "
                f"does, raise data.cache_timeout, or remove {folder / key}.lock-* when no such process runs"
            )


class _Watch:
    """What this process has seen of a lock: its holder, and for how long the counter has stood still."""

    def __init__(self) -> None:
        self.token, self.beat, self.owner = "", "", "another process"
        self.since = self.began = time.monotonic()
        self.announced = False

    def is_stale(self, lock: Path, after: float) -> bool:
        owner = _read_json(lock / "owner.json")
        # Opened anew each time: an open asks the server, a `stat` may be answered from NFS's memory.
        seen = (owner.get("token", ""), _read(lock / "beat"))
        if seen != (self.token, self.beat):
            (self.token, self.beat), self.since = seen, time.monotonic()
            self.owner = f"process {owner.get('pid', '?')} of {owner.get('host', 'an unknown host')}"
        return _is_dead(owner) or time.monotonic() - self.since > after


def _build(folder: Path, key: str, build: Callable[[Path], None], token: str) -> Path:
    final, part, failed = folder / key, folder / f"{key}.part-{token}", folder / f"{key}.failed"
    lock = next(folder / name for name in _locks(folder, key) if _read_json(folder / name / "owner.json").get("token") == token)
    try:
        with _beating(lock / "beat"):
            if final.is_dir():  # published between the look and the lock
                return final
            failed.unlink(missing_ok=True)
            part.mkdir()
            try:
                build(part)
                _flush(part)
                part.rename(final)
            except OSError:
                if not final.is_dir():  # else another process took over and was faster: its entry is the same
                    raise
        _flush(folder)
        for stray in folder.glob(f"{key}.part-*"):  # of builders that were killed
            shutil.rmtree(stray, ignore_errors=True)
        for name in _locks(folder, key):
            shutil.rmtree(folder / name, ignore_errors=True)
        return final
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, Exception):
            _write(failed, json.dumps({"token": token, "error": str(error) or repr(error)}))
        raise
    finally:
        shutil.rmtree(lock, ignore_errors=True)


@contextmanager
def _beating(beat: Path) -> Iterator[None]:
    stop = threading.Event()

    def raise_counter() -> None:
        count = 0
        while not stop.wait(BEAT):
            count += 1
            try:
                _write(beat, str(count))
            except OSError:
                return  # the lock was removed by hand

    thread = threading.Thread(target=raise_counter, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _acquire(lock: Path) -> str:
    """A token of our own if the lock is ours now, else nothing."""
    try:
        lock.mkdir()
    except FileExistsError:
        return ""
    token = uuid.uuid4().hex[:12]
    owner = {"token": token, "pid": os.getpid(), "host": os.uname().nodename, "machine": _machine(), "born": _born(os.getpid())}
    _write(lock / "beat", "0")
    _write(lock / "owner.json", json.dumps(owner))
    return token


def _is_dead(owner: dict) -> bool:
    """Whether /proc says so: only of a process of this machine (and this container)."""
    if not owner or owner["machine"] != _machine():
        return False
    born = _born(owner["pid"])
    return born is not None and born != owner["born"]


def _machine() -> str:
    """The boot and the process namespace: where a process number means the same process."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return f"unknown {uuid.getnode()} {os.getpid()}"  # no /proc: equal to nobody's


def _born(pid: int) -> str | None:
    """When a process started, in clock ticks; "" of one that is gone or a zombie, None without /proc."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "" if Path("/proc/self/stat").exists() else None
    except OSError:
        return None
    return "" if state in "ZX" else fields[18]


def _raise_failure(failed: Path, token: str) -> None:
    found = _read_json(failed)
    if found.get("token") == token:
        raise DataError(found["error"])


def _renew(entry: Path) -> None:
    """The entry was used now, for `prune`. A folder of somebody else, or read-only, stays as it is."""
    with suppress(OSError):
        os.utime(entry)


def _locks(folder: Path, key: str) -> list[str]:
    """Locks of a key, the one that counts last."""
    names = [name for name in os.listdir(folder) if name.startswith(f"{key}.lock-")]
    return sorted(names, key=lambda name: int(name.rpartition("-")[2]))


def _write(path: Path, text: str) -> None:
    with open(path, "w") as file:  # in place: who opens it after the close reads this, on NFS too
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _read_json(path: Path) -> dict:
    try:
        return json.loads(_read(path) or "{}")
    except ValueError:  # half written
        return {}


def _flush(folder: Path) -> None:
    """The names in a folder reach the disk; file systems that cannot say so are believed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)

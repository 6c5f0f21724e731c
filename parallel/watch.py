"""Hangs: every rank leaves a heartbeat; a rank that stops answering, or stops moving, is named and the job ended.

A thread of each rank writes `<folder>/rank_00002.json` about once a second: a counter, what the training thread
is doing, how often that has changed. Two things are a hang:

    silent   the counter of a rank stands still: the process is stopped, or its host is gone
    stuck    a rank's training thread has begun nothing new: it loops, sleeps, or waits for another rank

Each rank looks at itself and at the next rank, so no rank reads all files while nothing is wrong. Whoever sees a hang
first creates `hang` in the folder and becomes the judge; every rank that can, writes the stacks of all its threads and
leaves; those that cannot are sent a signal, whose handler (faulthandler's, in C) needs no interpreter. The judge names
the rank: a silent one, else the one that is not waiting inside a collective operation.

Ages are measured by the reader's monotonic clock between two changes that it saw itself: neither a jump of the wall
clock nor different clocks on two hosts can be taken for a hang. The folder must be one that all hosts see, like the
checkpoints'.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import linecache
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from megalign.parallel.grid import Grid
from megalign.parallel.local import record_failure

STACKS_SIGNAL = signal.SIGUSR2
_BYTES = 1024  # of a heartbeat: overwritten in place, it needs no space on a disk that has filled up
_ENDED = -1  # the counter of a rank that has closed its watch
_WAITING = re.compile(r"\.wait\(|barrier\(|synchronize\(|\.item\(\)|\.tolist\(\)")  # the last two block on CUDA


class RankHung(Exception):
    """A rank stopped answering; the message names it and the files with the stacks."""


@dataclass(frozen=True)
class Position:
    """What the training thread of a rank does. `changes` grows with every phase that begins."""

    step: int
    phase: str
    changes: int
    watched: bool  # False while long silence is normal: start-up, the answers at the end


@dataclass(frozen=True)
class Heartbeat:
    """What a rank says of itself. `stuck`: seconds since `position.changes` last grew."""

    rank: int
    host: str
    pid: int
    pid_namespace: str  # a pid means something only within it
    beat: int
    stuck: float
    waiting: bool
    place: str
    position: Position

    def encode(self) -> bytes:
        text = json.dumps(asdict(self)).encode()
        if len(text) > _BYTES:
            text = json.dumps({**asdict(self), "place": "", "host": self.host[:64]}).encode()
        return text.ljust(_BYTES)

    @staticmethod
    def decode(content: bytes) -> Heartbeat | None:
        """None for a file that is empty or was read while it was written."""
        try:
            row = json.loads(content)
            return Heartbeat(**{**row, "position": Position(**row["position"])})
        except (ValueError, TypeError, KeyError):
            return None


def is_waiting(frame: FrameType | None) -> bool:
    """True if a thread with this innermost frame waits for other ranks."""
    if frame is not None and _WAITING.search(linecache.getline(frame.f_code.co_filename, frame.f_lineno)):
        return True
    for _ in range(3):
        if frame is None:
            return False
        if frame.f_code.co_filename.endswith(os.path.join("torch", "distributed", "distributed_c10d.py")):
            return True
        frame = frame.f_back
    return False


def name_the_hung(beats: Sequence[Heartbeat | None], silent: Sequence[int]) -> tuple[int, str]:
    """(rank, what it does) of the rank that the others wait for. beats: by rank; silent: whose counter stands still."""
    for rank in silent:
        beat = beats[rank]
        if beat is None:
            return rank, "has left no heartbeat"
        return rank, f"(host {beat.host}, pid {beat.pid}) does not answer; it was last seen in step {beat.position.step}, {beat.position.phase}"
    known = [beat for beat in beats if beat is not None and beat.position.watched]
    beat = max(known, key=lambda beat: (not beat.waiting, beat.stuck))
    others = sum(other.waiting for other in known if other is not beat)
    doing = f"(host {beat.host}, pid {beat.pid}) is stuck in step {beat.position.step}, {beat.position.phase}, at {beat.place}"
    return beat.rank, f"{doing}; {others} of the other {len(beats) - 1} ranks wait inside a collective operation"


class Watch:
    """The heartbeat of this rank and its look at the next one. `start` and `close` on all ranks."""

    def __init__(self, folder: Path, grid: Grid, timeout: float, position: Callable[[], Position]):
        """timeout: seconds. position: called from the watching thread; must not block."""
        self.folder, self.grid, self.timeout, self.position = folder, grid, timeout, position
        self.interval = min(1.0, timeout / 5)
        self.grace = max(2.0, 3 * self.interval)  # for signals, the last stacks and the verdict
        self.main = threading.main_thread().ident or 0
        self.thread = threading.Thread(target=self._run, name="hang-watch", daemon=True)
        self.stop = threading.Event()
        self.beat = 0
        self.moved = time.monotonic()
        self.changes = -1
        self.seen: dict[int, tuple[int, float]] = {}  # rank -> (its counter, when it was first read)

    def start(self) -> None:
        """Begin (collective). What an earlier run left in the folder is removed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.grid.is_logger:
            for name in ["hang", "verdict", *(path.name for path in self.folder.glob("rank_*"))]:
                (self.folder / name).unlink(missing_ok=True)
        dist.barrier()
        self.beat_file = os.open(self._file(self.grid.rank, "json"), os.O_RDWR | os.O_CREAT, 0o644)
        self.stacks_file = self._file(self.grid.rank, "stacks").open("w")
        faulthandler.register(STACKS_SIGNAL, file=self.stacks_file, all_threads=True)
        self._beat()
        dist.barrier()
        self.thread.start()

    def close(self) -> None:
        """End; the last heartbeat says so, and the silence that follows is no hang."""
        if self.thread.is_alive():
            self.stop.set()
            self.thread.join()
            self.beat = _ENDED - 1
            self._beat()
            faulthandler.unregister(STACKS_SIGNAL)
            self.stacks_file.close()
            os.close(self.beat_file)

    def _file(self, rank: int, kind: str) -> Path:
        return self.folder / f"rank_{rank:05d}.{kind}"

    def _run(self) -> None:
        while not self.stop.wait(self.interval):
            mine = self._beat()
            if (self.folder / "hang").exists():
                self._leave()
            stuck = mine.position.watched and mine.stuck > self.timeout
            if stuck or self._silence((self.grid.rank + 1) % self.grid.world) > self.timeout:
                with contextlib.suppress(FileExistsError):
                    os.close(os.open(self.folder / "hang", os.O_CREAT | os.O_EXCL))
                    self._judge()

    def _beat(self) -> Heartbeat:
        position, now = self.position(), time.monotonic()
        if position.changes != self.changes or not position.watched:
            self.changes, self.moved = position.changes, now
        frame = sys._current_frames().get(self.main)
        place = f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}" if frame else ""
        self.beat += 1
        beat = Heartbeat(
            self.grid.rank, socket.gethostname(), os.getpid(), _pid_namespace(), self.beat, round(now - self.moved, 2), is_waiting(frame), place, position
        )
        with contextlib.suppress(OSError):  # a disk that fails for a while is no hang
            os.pwrite(self.beat_file, beat.encode(), 0)
        return beat

    def _read(self, rank: int) -> Heartbeat | None:
        try:
            return Heartbeat.decode(self._file(rank, "json").read_bytes())
        except OSError:
            return None

    def _silence(self, rank: int) -> float:
        """Seconds for which this rank has seen no new heartbeat of `rank`."""
        beat, now = self._read(rank), time.monotonic()
        known, since = self.seen.get(rank, (0, now))
        if beat is not None and (beat.beat != known or beat.beat == _ENDED):
            known, since = beat.beat, now
        self.seen[rank] = known, since
        return now - since

    def _judge(self) -> None:
        """Collect everybody's stacks, say who hung, and leave."""
        self._dump()
        first = [self._read(rank) for rank in range(self.grid.world)]
        time.sleep(self.grace)
        beats = [self._read(rank) for rank in range(self.grid.world)]
        # Who has seen `hang` wrote its stacks and beats no more, so that stacks are a sign of life too.
        silent = [rank for rank, beat in enumerate(beats) if beat == first[rank] and not self._has_stacks(rank)]
        for beat in (beats[rank] for rank in silent):
            if beat is not None and (beat.host, beat.pid_namespace) == (socket.gethostname(), _pid_namespace()):
                with contextlib.suppress(OSError):
                    os.kill(beat.pid, STACKS_SIGNAL)
                    os.kill(beat.pid, signal.SIGCONT)
        deadline = time.monotonic() + self.grace
        while not all(map(self._has_stacks, range(self.grid.world))) and time.monotonic() < deadline:
            time.sleep(0.1)
        rank, what = name_the_hung([first[rank] if rank not in silent else beats[rank] for rank in range(self.grid.world)], silent)
        missing = [str(rank) for rank in range(self.grid.world) if not self._has_stacks(rank)]
        told = f" (none could be had from rank {', '.join(missing)})" if missing else ""
        message = (
            f"rank {rank} of {self.grid.world} {what}. Nothing happened there for train.hang_timeout_seconds = {self.timeout:g}, so all ranks were stopped; "
            f"stacks of all ranks: {self.folder}/rank_*.stacks{told}. The same command continues from the last complete checkpoint"
        )
        with contextlib.suppress(OSError):
            (self.folder / "verdict").write_text(message)
        self._end(message, judge=True)

    def _leave(self) -> None:
        """Leave stacks, wait for the verdict, and leave."""
        self._dump()
        deadline = time.monotonic() + 4 * self.grace
        message = ""
        while not message and time.monotonic() < deadline:
            time.sleep(0.1)
            with contextlib.suppress(OSError):
                message = (self.folder / "verdict").read_text()
        self._end(message or f"a rank hung; its judge has not said which. Stacks of all ranks: {self.folder}/rank_*.stacks", judge=not message)

    def _end(self, message: str, judge: bool) -> None:
        # The judge says it: once it leaves, the others' collectives fail, and their main threads may end them before they have read it.
        record_failure(RankHung(message), expected=True, says=judge)
        os._exit(1)  # the training thread may wait for ever

    def _dump(self) -> None:
        with contextlib.suppress(OSError):
            faulthandler.dump_traceback(self.stacks_file, all_threads=True)

    def _has_stacks(self, rank: int) -> bool:
        file = self._file(rank, "stacks")
        return file.exists() and file.stat().st_size > 0


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


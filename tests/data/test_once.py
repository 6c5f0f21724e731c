"""One of many processes builds, whatever happens to it: killed, asleep, failed, slow."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megalign.data import once
from megalign.data.once import build_once
from megalign.data.rows import DataError

# Each build adds a line to builds.log. `argv`: folder, machine or "", seconds until stale, what the first build does.
PROCESS = """
import os, sys, time
from pathlib import Path
from megalign.data import once
folder, machine, stale, first = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), sys.argv[4]
once.BEAT, once.POLL = 0.1, 0.02
if machine:  # as if on another host: its processes cannot be looked up
    once._machine = lambda: machine
def build(part):
    with open(folder / "builds.log", "a") as log:
        log.write(f"{os.getpid()}\\n")
    is_first = len((folder / "builds.log").read_text().split()) == 1
    (part / "half").write_text("half")
    if is_first and first == "fail":
        while len(list(folder.glob("ready-*"))) < 3:  # who has not begun to wait would build it anew
            time.sleep(0.01)
        time.sleep(1.0)
        raise ValueError("the builder's reason")
    time.sleep({"hang": 60, "slow": 1.5, "fail": 0}[first] if is_first else 0.2)
    (part / "whole").write_text("content")
(folder / f"ready-{os.getpid()}").touch()
try:
    entry = once.build_once(folder / "cache", "entry-1", build, stale_after=stale, timeout=40, say=print)
    print("content:", (entry / "whole").read_text(), sorted(path.name for path in entry.iterdir()))
except Exception as error:
    print(type(error).__name__, error)
"""


def start(folder: Path, count: int, *, stale: float = 30.0, first: str = "slow", hosts: bool = False) -> list[subprocess.Popen]:
    return [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(folder), f"host {number}" if hosts else "", str(stale), first],
            stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        for number in range(count)
    ]  # fmt: skip


def first_builder(folder: Path, processes: list[subprocess.Popen]) -> subprocess.Popen:
    log = folder / "builds.log"
    deadline = time.monotonic() + 30
    while not (log.exists() and log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return next(process for process in processes if process.pid == int(log.read_text().split()[0]))


def outputs(processes: list[subprocess.Popen]) -> list[str]:
    return [process.communicate(timeout=60)[0].strip().splitlines()[-1] for process in processes]


def builds(folder: Path) -> int:
    return len((folder / "builds.log").read_text().split())


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "cache").iterdir())


WHOLE = "content: content ['half', 'whole']"


def test_four_race_one_builds(tmp_path: Path):
    assert outputs(start(tmp_path, 4)) == [WHOLE] * 4
    assert builds(tmp_path) == 1 and left(tmp_path) == ["entry-1"]


@pytest.mark.parametrize("hosts", [False, True], ids=["same-host", "other-hosts"])
def test_a_killed_builder_is_replaced_by_one(tmp_path: Path, hosts: bool):
    """kill -9 in the middle of a build: one of the other three makes it again, nothing half made is ever seen."""
    processes = start(tmp_path, 4, first="hang", hosts=hosts, stale=1.0 if hosts else 30.0)
    builder = first_builder(tmp_path, processes)
    time.sleep(0.5)
    assert not (tmp_path / "cache" / "entry-1").exists()
    killed = time.monotonic()
    builder.kill()
    builder.wait()
    assert outputs([process for process in processes if process is not builder]) == [WHOLE] * 3
    assert time.monotonic() - killed < 15  # not the 30 s of a stale lock where /proc tells
    assert builds(tmp_path) == 2 and left(tmp_path) == ["entry-1"]


def test_a_slow_builder_that_beats_is_waited_for(tmp_path: Path):
    """1.5 s of work with beats every 0.1 s: at 0.7 s without a beat nobody else begins."""
    assert outputs(start(tmp_path, 3, stale=0.7, hosts=True)) == [WHOLE] * 3
    assert builds(tmp_path) == 1


def test_a_builder_that_slept_and_wakes_up_does_no_harm(tmp_path: Path):
    processes = start(tmp_path, 3, stale=0.7, hosts=True)
    builder = first_builder(tmp_path, processes)
    builder.send_signal(signal.SIGSTOP)
    assert outputs([process for process in processes if process is not builder]) == [WHOLE] * 2
    builder.send_signal(signal.SIGCONT)
    assert outputs([builder]) == [WHOLE]
    assert builds(tmp_path) == 2 and left(tmp_path) == ["entry-1"]


def test_who_waited_hears_why_it_failed(tmp_path: Path):
    processes = start(tmp_path, 3, first="fail")
    builder = first_builder(tmp_path, processes)
    found = sorted(outputs(processes))
    assert found == ["DataError the builder's reason"] * 2 + ["ValueError the builder's reason"]
    assert builder.returncode == 0 and builds(tmp_path) == 1 and left(tmp_path) == ["entry-1.failed"]
    assert outputs(start(tmp_path, 2)) == [WHOLE] * 2  # the next run tries again
    assert left(tmp_path) == ["entry-1"]


def test_waiting_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "k.lock-1").mkdir()
    monkeypatch.setattr(once, "POLL", 0.01)
    with pytest.raises(DataError, match=r"waited 0 s for another process, which is making .*data.cache_timeout"):
        build_once(tmp_path, "k", lambda part: None, timeout=0.1)


def test_a_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data.cache_dir: .*file/cache cannot be made"):
        build_once(tmp_path / "file" / "cache", "k", lambda part: None)

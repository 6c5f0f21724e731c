"""Disks that are full or broken, a clock that jumps: a clear end, nothing lost, and the same command continues."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import fault_checks
import pytest
from ranks import run_ranks
from sft_checks import curve, metrics, recipe
from test_command_line import TINY

from megalign.parallel.checkpoint import list_checkpoints, verify

TWO = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


def test_io_errors_and_a_jumping_clock(tmp_path: Path):
    train = {"save_interval": 2, "keep_last": 9, "max_steps": 6}
    sync = recipe(tmp_path / "sync", parallel=TWO, train=train)
    background = recipe(tmp_path / "async", parallel=TWO, train={**train, "async_save": True})
    clock = recipe(tmp_path / "clock", parallel=TWO, train={**train, "max_minutes": 20.0, "hang_timeout_seconds": 60.0})
    told = run_ranks(fault_checks.every_fault, 2, sync, background, clock)[0]
    for name, failed, continued in (("sync", *told[0:2]), ("async", *told[2:4])):
        assert failed.startswith("CheckpointError: checkpoint of step 4 was not written: rank 1 could not write: [Errno 5] Input/output error"), failed
        assert continued == ""
        resumed = [row["message"] for row in metrics(tmp_path / name, "event") if row["event"] == "resume"]
        assert resumed == ["continues from iter_0000002"]
        assert [path.name for path in sorted((tmp_path / name / "checkpoints").iterdir())] == [f"iter_000000{step}" for step in (2, 4, 6)]
    assert told[4] == "" and len(curve(tmp_path / "clock")) == 6
    assert curve(tmp_path / "sync", "loss") == curve(tmp_path / "async", "loss") == curve(tmp_path / "clock", "loss")
    assert all(0 < row["step_time"] < 600 and row["tokens_per_second"] > 0 for row in metrics(tmp_path / "clock"))


SMALL_DISK = """
mount -t tmpfs -o size=$SIZE tmpfs $DISK || exit 77
"$@" ; echo "first $?"
(cd $DISK/run/checkpoints; ls -A; cp -a . $KEPT)
mount -o remount,size=256m $DISK
"$@" train.stop_at_step=$STOP ; echo "second $?"
cp $DISK/run/metrics.jsonl $KEPT
"""


def mounts_allowed() -> bool:
    """True if this user may mount a file system in a namespace of their own."""
    done = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True)
    return done.returncode == 0


@pytest.mark.parametrize("background", ["false", "true"], ids=["sync", "async"])
def test_a_disk_that_fills_up(tmp_path: Path, background: str):
    """ENOSPC as a user meets it: a real small disk, the command line, two ranks; then space is made and the command repeated."""
    if not mounts_allowed():
        pytest.skip("no file system can be mounted here; test_sft.py limits file sizes instead")
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    kept.mkdir()
    command = [sys.executable, "-m", "megalign", "sft", "sft-dense", *TINY, f"output={disk}/run", "train.keep_last=100", f"train.async_save={background}"]
    command += ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
    environment = {"SIZE": "4m", "DISK": str(disk), "KEPT": str(kept), "STOP": "60"}
    done = subprocess.run(["unshare", "-rm", "sh", "-c", SMALL_DISK, "sh", *command], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300)
    assert "first 1\n" in done.stdout and "second 0\n" in done.stdout, done
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "was not written" in message and "No space left on device" in message and "Earlier checkpoints are intact" in message, message
    assert "Traceback" not in done.stderr, done.stderr
    names = [line for line in done.stdout.splitlines() if line.startswith((".iter", "iter_"))]
    assert names and not any(name.startswith(".") for name in names), "the unfinished checkpoint still takes space"
    checkpoints = list_checkpoints(kept)
    assert [path.name for path in checkpoints] == names
    for checkpoint in checkpoints:
        verify(checkpoint)
    rows = [json.loads(line) for line in (kept / "metrics.jsonl").read_text().splitlines()]
    assert f"continues from {names[-1]}" in [row.get("message") for row in rows]
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 61))


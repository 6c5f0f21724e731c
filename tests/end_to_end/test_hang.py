"""A rank that hangs is named within the configured time, and the job ends with the stacks of all ranks."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from test_command_line import TINY, descendants, start

TIMEOUT = 4.0
TWO = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true", f"train.hang_timeout_seconds={TIMEOUT:g}"]


def heartbeat(output: Path, rank: int) -> dict:
    return json.loads((output / "logs" / "watch" / f"rank_{rank:05d}.json").read_text())


def stacks(output: Path) -> list[str]:
    return [(output / "logs" / "watch" / f"rank_{rank:05d}.stacks").read_text() for rank in range(2)]


def wait_for_steps(process: subprocess.Popen[str], output: Path) -> None:
    deadline = time.monotonic() + 120
    while not (output / "metrics.jsonl").exists() or '"train", "step": 3' not in (output / "metrics.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)


def test_a_stopped_rank_is_named_and_the_job_ends(tmp_path: Path):
    """SIGSTOP, under our own launcher: the rank cannot say anything itself."""
    process = start(tmp_path / "run", *TWO)
    wait_for_steps(process, tmp_path / "run")
    family, beat = descendants(process), heartbeat(tmp_path / "run", 1)
    psutil.Process(beat["pid"]).send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - stopped < TIMEOUT + 20
    assert process.returncode == 1 and errors.count("error:") == 1, errors
    assert f"rank 1 of 2 (host {beat['host']}, pid {beat['pid']}) does not answer; it was last seen in step " in errors
    assert f"train.hang_timeout_seconds = {TIMEOUT:g}" in errors and "continues from the last complete checkpoint" in errors
    # The training thread's: a signal finds it in a step or in an evaluation.
    assert all(" in fit\n" in text for text in stacks(tmp_path / "run")), "stacks of both, the stopped one too"
    assert not psutil.wait_procs(family, timeout=10)[1], "orphans"


def test_a_rank_asleep_in_a_step_is_told_from_the_one_that_waits_for_it(tmp_path: Path):
    """Under torchrun, which knows nothing of us."""
    output = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(Path(__file__).with_name("hanging_rank.py"))]
    began = time.monotonic()
    done = subprocess.run([*command, "sft", "sft-dense", *TINY, f"output={output}", *TWO, "train.eval_interval=null"], capture_output=True, text=True, timeout=180)
    assert done.returncode != 0 and time.monotonic() - began < 180
    verdict = (output / "logs" / "watch" / "verdict").read_text()
    assert verdict in done.stderr
    assert verdict.startswith("rank 1 of 2 ") and "is stuck in step 3, forward, at" in verdict and "hanging_rank.py" in verdict
    assert "1 of the other 1 ranks wait inside a collective operation" in verdict
    waiting, asleep = stacks(output)
    assert "all_reduce" in waiting or "distributed_c10d.py" in waiting
    assert "in token_loss" in asleep and "distributed_c10d.py" not in asleep.split("in token_loss")[0].split("Thread")[-1]

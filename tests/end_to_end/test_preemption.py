"""SIGTERM and SIGUSR1: the step is finished, saved on all ranks, exit code 75, and the next start continues bitwise."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest
from ranks import run_ranks
from stopped_runs import (
    STEPS,
    content,
    curve,
    end,
    evaluations,
    lines,
    ranks_of,
    recipe,
    start,
    train,
    wait_for_step,
)

from megalign.parallel.checkpoint import list_checkpoints, read_meta, verify
from megalign.parallel.preempt import PREEMPTED, Preempted, StopSignals

TORCHRUN = Path(sys.executable).with_name("torchrun")


def interrupt(command: list[str], output: Path, number: int, *, step: int, target: str = "launcher") -> tuple[int, str]:
    """Start, wait for `step`, send the signal to the launcher or to one rank; return exit code and stderr."""
    process = start(command)
    wait_for_step(process, output, step)
    ranks = ranks_of(process)
    assert len(ranks) == 2
    family = psutil.Process(process.pid).children(recursive=True)
    (process if target == "launcher" else ranks[1]).send_signal(number)
    return end(process, family)


def saved_step(output: Path) -> int:
    """Step of the last checkpoint, which is whole and the last line of the record."""
    last = list_checkpoints(output / "checkpoints")[-1]
    verify(last)
    step = read_meta(last)["training"]["progress"]["step"]
    assert step == lines(output)[-1]["step"] < STEPS
    assert "the same command continues" in lines(output, "event")[-1]["message"]
    return step


def test_stopped_three_ways_and_continued_is_the_run_that_was_not_stopped(tmp_path: Path):
    """SIGTERM to torchrun, SIGUSR1 to one rank of our launcher, SIGTERM to our launcher; compared bitwise with the whole run."""
    whole, parts = recipe(tmp_path, "whole"), recipe(tmp_path, "parts")
    output = tmp_path / "parts"
    run_ranks(train, 2, content(whole))
    assert len(curve(tmp_path / "whole")) == STEPS

    torchrun = [str(TORCHRUN), "--nproc-per-node", "2", "-m", "megalign", "sft", str(parts)]  # as README writes it
    own = [sys.executable, "-m", "megalign", "sft", str(parts)]
    code, _ = interrupt(torchrun, output, signal.SIGTERM, step=3)
    assert code != 0  # torchrun hides 75; launch/torchrun.sh gives it back
    first = saved_step(output)
    assert len(list_checkpoints(output / "checkpoints")) == 1  # nothing but the signal made it save
    code, errors = interrupt(own, output, signal.SIGUSR1, step=first + 2, target="rank")
    assert code == PREEMPTED == 75, errors
    assert "the same command continues from there" in errors and "Traceback" not in errors and "error:" not in errors
    second = saved_step(output)
    assert second >= first + 2
    code, errors = interrupt(own, output, signal.SIGTERM, step=second + 2)
    assert code == PREEMPTED and "Traceback" not in errors, errors
    saved_step(output)

    run_ranks(train, 2, content(parts))
    assert curve(output) == curve(tmp_path / "whole")
    assert evaluations(output) == evaluations(tmp_path / "whole")  # the evaluations left out for haste are made up for


def test_a_signal_before_and_after_training_ends_the_process_as_ever():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == "SIGUSR1"
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before


def test_once_saved_a_launcher_that_hurries_us_does_not_break_the_leave():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    try:
        with pytest.raises(Preempted, match="after step 7, which is saved"), StopSignals():
            raise Preempted(7, "SIGTERM")
        os.kill(os.getpid(), signal.SIGTERM)  # we are still here
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGUSR1, before[1])

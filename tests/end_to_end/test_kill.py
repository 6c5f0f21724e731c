"""kill -9 at random moments of a 4-rank run: every restart continues bitwise from the last complete checkpoint."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from megalign.parallel.checkpoint import list_checkpoints, verify

FOUR = (
    "model.num_layers=2 model.hidden_size=32 model.ffn_hidden_size=48 model.num_attention_heads=4 model.num_query_groups=2 "
    "model.num_moe_experts=4 model.moe_ffn_hidden_size=24 data.max_rows=60 data.validation_rows=4 data.sequence_length=128 "
    "data.tokenizer.vocab_size=300 optimizer.lr_decay_style=constant optimizer.lr_warmup_steps=0 optimizer.min_lr=0 "
    "train.micro_batch_size=1 train.global_batch_size=4 train.max_steps=100000 train.save_interval=3 train.eval_interval=4 "
    "train.keep_last=2 train.keep_best=1 train.exact_match=false train.sample_prompts=1 train.sample_tokens=4 logging.tensorboard=false logging.report=false"
).split()
MOMENTS = ("start-up", "step", "evaluation", "checkpoint write", "async write")
SECONDS = 180.0  # for an attempt to reach its moment


def command(output: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "megalign", "sft", "quickstart", *FOUR, f"output={output}", *more]


def rows(output: Path) -> list[dict[str, Any]]:
    """Complete lines of metrics.jsonl."""
    file = output / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def curve(output: Path) -> dict[tuple[str, int], tuple[float, ...]]:
    names = {"train": ("loss", "grad_norm", "num_tokens", "epoch"), "eval": ("eval_loss",)}
    return {(row["kind"], row["step"]): tuple(row[name] for name in names[row["kind"]]) for row in rows(output) if row["kind"] in names}


def processes(output: Path) -> list[psutil.Process]:
    """Everything that runs for this folder, forks included."""
    found = []
    for process in psutil.process_iter():
        try:
            if f"output={output}" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


class Attempt:
    """One start of the run, killed at a moment."""

    def __init__(self, output: Path, moment: str, dice: random.Random):
        self.output, self.moment, self.dice = output, moment, dice
        self.known = len(rows(output))
        self.log = output.with_suffix(".log").open("ab")
        background = "true" if moment == "async write" else "false"
        self.launcher = subprocess.Popen(command(output, f"train.async_save={background}"), stdout=self.log, stderr=self.log, start_new_session=True)

    def wait(self) -> None:
        """Until the run is at the moment, then a little longer."""
        began = time.monotonic()
        if self.moment == "start-up":
            time.sleep(self.dice.uniform(0.0, 12.0))
            return
        first = None
        at_least = self.dice.randint(1, 6)  # steps of this attempt, so that the run gets on
        while True:
            assert self.launcher.poll() is None, self.output.with_suffix(".log").read_text()[-3000:]
            assert time.monotonic() - began < SECONDS, f"{self.moment} did not come"
            steps = [row["step"] for row in rows(self.output)[self.known :] if row["kind"] == "train"]
            if steps:
                first = first or steps[0]
                if steps[-1] - first >= at_least and self.here(steps[-1]):
                    break
            time.sleep(0.002)
        time.sleep(self.dice.uniform(0.0, 0.03))

    def here(self, step: int) -> bool:
        writes = self.moment in ("checkpoint write", "async write")
        if writes:
            return any((self.output / "checkpoints").glob(".iter_*.partial"))
        return step % 4 == 0 if self.moment == "evaluation" else True

    def kill(self) -> str:
        """A random rank or the launcher; return which."""
        ranks = [process for process in processes(self.output) if process.pid != self.launcher.pid]
        victim = self.dice.choice([self.launcher.pid, *(process.pid for process in ranks)])
        os.kill(victim, signal.SIGKILL)
        self.launcher.wait(timeout=60)
        deadline = time.monotonic() + 10
        while processes(self.output):
            assert time.monotonic() < deadline, f"orphans of a kill at {self.moment}: {processes(self.output)}"
            time.sleep(0.05)
        self.log.close()
        return "launcher" if victim == self.launcher.pid else "rank"


def kill_again_and_again(folder: Path, moments: list[str], seed: int) -> Counter[tuple[str, str]]:
    """Kill a run once a moment, look at what is left each time; then compare it with a run left in peace."""
    dice, killed, whole = random.Random(seed), folder / "killed", folder / "whole"
    counts: Counter[tuple[str, str]] = Counter()
    for moment in moments:
        before = [path.name for path in list_checkpoints(killed / "checkpoints")]
        attempt = Attempt(killed, moment, dice)
        known = attempt.known
        attempt.wait()
        counts[moment, attempt.kill()] += 1
        cut = any((killed / "checkpoints").glob(".iter_*.partial"))
        counts["unfinished checkpoint left", ""] += cut
        for checkpoint in list_checkpoints(killed / "checkpoints"):
            verify(checkpoint)
        assert all((path / "manifest.json").exists() for path in (killed / "checkpoints").glob("iter_*"))
        resumed = [row["message"] for row in rows(killed)[known:] if row.get("event") == "resume"]
        assert resumed == ([f"continues from {before[-1]}"] if before and resumed else [])
        assert before[-1:] <= [path.name for path in list_checkpoints(killed / "checkpoints")][-1:], "a checkpoint was lost"
    end = max((step for _, step in curve(killed)), default=0) + 4
    for output in (killed, whole):
        done = subprocess.run(command(output, f"train.stop_at_step={end}"), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    expected = curve(whole)
    assert {("train", step) for step in range(1, end + 1)} <= expected.keys()
    assert curve(killed) == expected
    assert not list((killed / "checkpoints").glob(".*")), "what the kills left half-written was removed"
    return counts


def test_kills_in_every_part_of_a_run(tmp_path: Path):
    counts = kill_again_and_again(tmp_path, ["step", "evaluation", "checkpoint write", "async write"], seed=7)
    print(dict(counts))


@pytest.mark.soak
def test_fifty_kills(tmp_path: Path):
    """Ten at each moment, in random order."""
    moments = [moment for moment in MOMENTS for _ in range(10)]
    random.Random(1).shuffle(moments)
    counts = kill_again_and_again(tmp_path, moments, seed=1)
    print(dict(counts))
    assert counts["unfinished checkpoint left", ""] >= 5, counts
    assert {who for _, who in counts} >= {"rank", "launcher"}

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
MOMENTS = ("start-up", "step", "evaluation", "checkpoint write", "async write")  # start-up: of a run that resumes, mostly
SECONDS = 240.0  # for an attempt to reach its moment
LOOK = 0.004  # seconds between looks at the run: it needs the cores more than we do


def command(output: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "megalign", "sft", "quickstart", *FOUR, f"output={output}", *more]


def rows(output: Path) -> list[dict[str, Any]]:
    """Complete lines of metrics.jsonl."""
    file = output / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def resumed(output: Path) -> list[str]:
    return [row["message"] for row in rows(output) if row.get("event") == "resume"]


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


class Steps:
    """Training steps of one attempt as its record grows: the file is another one once the run has cut it back and goes on."""

    def __init__(self, output: Path):
        self.path = output / "metrics.jsonl"
        self.inode = self._inode()
        self.offset, self.last, self.count, self.own = 0, 0, 0, self.inode is None

    def _inode(self) -> int | None:
        return self.path.stat().st_ino if self.path.exists() else None

    def look(self) -> None:
        """Read what has come. `count`: steps of this attempt, `last`: number of the last one."""
        inode = self._inode()
        if not self.own:
            if inode == self.inode:
                return
            self.own, self.offset = True, self.path.stat().st_size  # steps come seconds later
        if inode is None:
            return
        with self.path.open("rb") as file:
            file.seek(self.offset)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self.offset += len(whole)
        for row in map(json.loads, whole.splitlines()):
            if row["kind"] == "train":
                self.last, self.count = row["step"], self.count + 1


class Attempt:
    """One start of the run, killed at a moment. `start_up`: seconds that the attempts before took to their first step."""

    start_up = 12.0

    def __init__(self, output: Path, moment: str, dice: random.Random):
        self.output, self.moment, self.dice = output, moment, dice
        self.steps = Steps(output)
        self.log = output.with_suffix(".log").open("ab")
        background = "true" if moment == "async write" else "false"
        self.launcher = subprocess.Popen(command(output, f"train.async_save={background}"), stdout=self.log, stderr=self.log, start_new_session=True)

    def wait(self) -> None:
        """Until the run is at the moment, then a little longer."""
        began = time.monotonic()
        if self.moment == "start-up":
            time.sleep(self.dice.uniform(0.0, Attempt.start_up))
            return
        at_least = self.dice.randint(2, 7)  # steps of this attempt, so that the run gets on
        while self.steps.count < at_least or not self.here():
            assert self.launcher.poll() is None, self.output.with_suffix(".log").read_text()[-3000:]
            assert time.monotonic() - began < SECONDS, f"{self.moment} did not come"
            time.sleep(LOOK)
            before = self.steps.count
            self.steps.look()
            if not before and self.steps.count:
                Attempt.start_up = time.monotonic() - began
        time.sleep(self.dice.uniform(0.0, 0.03))

    def here(self) -> bool:
        if self.moment in ("checkpoint write", "async write"):
            return any((self.output / "checkpoints").glob(".iter_*.partial"))
        return self.steps.last % 4 == 0 if self.moment == "evaluation" else True

    def kill(self, who: str) -> str:
        """The launcher or a random rank; return which. In the first moments there is no rank yet."""
        ranks = [process.pid for process in processes(self.output) if process.pid != self.launcher.pid]
        victim = self.dice.choice(ranks) if who == "rank" and ranks else self.launcher.pid
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
    victims = ["launcher" if i % 4 == 3 else "rank" for i in range(len(moments))]
    dice.shuffle(victims)
    for moment, who in zip(moments, victims, strict=True):
        before = [path.name for path in list_checkpoints(killed / "checkpoints")]
        attempt = Attempt(killed, moment, dice)
        resumptions = resumed(killed)
        attempt.wait()
        counts[moment, attempt.kill(who)] += 1
        cut = any((killed / "checkpoints").glob(".iter_*.partial"))
        counts["unfinished checkpoint left", ""] += cut
        for checkpoint in list_checkpoints(killed / "checkpoints"):
            verify(checkpoint)
        assert all((path / "manifest.json").exists() for path in (killed / "checkpoints").glob("iter_*"))
        new = resumed(killed)[len(resumptions) :]
        assert new == ([f"continues from {before[-1]}"] if before and new else [])
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
    """Equally many at each moment, in random order. MEGALIGN_KILLS: how many, MEGALIGN_SEED: which."""
    kills, seed = int(os.environ.get("MEGALIGN_KILLS", "50")), int(os.environ.get("MEGALIGN_SEED", "1"))
    moments = [MOMENTS[i % len(MOMENTS)] for i in range(kills)]
    random.Random(seed).shuffle(moments)
    began = time.monotonic()
    counts = kill_again_and_again(tmp_path, moments, seed)
    found = {f"{moment}, {who}" if who else moment: count for (moment, who), count in sorted(counts.items())}
    print(json.dumps({"seed": seed, "kills": kills, "seconds": round(time.monotonic() - began), "counts": found}))
    assert counts["unfinished checkpoint left", ""] >= kills // 10, counts
    assert {who for _, who in counts} >= {"rank", "launcher"}

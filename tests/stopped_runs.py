"""A small run that is stopped by a signal, and what it leaves: for tests of every way to start ranks."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import yaml

STEPS = 40
EXACT = ("step", "loss", "grad_norm", "learning_rate", "num_tokens", "epoch")


def recipe(folder: Path, name: str, **parallel: Any) -> Path:
    """Dropout, so that generators matter; an evaluation after every step, so that the one skipped for haste is missed."""
    path = folder / f"{name}.yaml"
    content = {
        "output": str(folder / name),
        "model": dict(num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, hidden_dropout=0.1),
        "parallel": parallel or dict(tensor_model_parallel_size=2, sequence_parallel=True),
        "data": dict(train="grammar", max_rows=60, validation_rows=4, sequence_length=128, tokenizer=dict(vocab_size=300)),
        "optimizer": dict(lr=3e-3, lr_warmup_steps=2),
        "train": dict(micro_batch_size=1, global_batch_size=4, max_steps=STEPS, eval_interval=1, keep_best=0, save_interval=1000, sample_prompts=0),
        "logging": dict(tensorboard=False, report=False),
    }
    path.write_text(yaml.safe_dump(content))
    return path


def content(recipe: Path) -> dict[str, Any]:
    return yaml.safe_load(recipe.read_text())


def lines(output: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Whole lines of metrics.jsonl of a kind."""
    path = output / "metrics.jsonl"
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []
    return [row for row in map(json.loads, whole) if row["kind"] == kind]


def curve(output: Path) -> list[tuple]:
    return [tuple(row[key] for key in EXACT) for row in lines(output)]


def evaluations(output: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["eval_loss"]) for row in lines(output, "eval")]


def start(command: list[str], environment: Mapping[str, str] = os.environ) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment)


def wait_for_step(process: subprocess.Popen[str], output: Path, step: int) -> None:
    deadline = time.time() + 240
    while len(lines(output)) < step:
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.02)


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The training processes below a launcher."""
    return [child for child in psutil.Process(process.pid).children(recursive=True) if is_rank(child)]


def is_rank(process: psutil.Process) -> bool:
    command = [word for word in process.cmdline() if word != "-u"]
    return command[1:3] == ["-m", "megalign"]


def end(process: subprocess.Popen[str], family: list[psutil.Process]) -> tuple[int, str]:
    """Exit code and stderr; nobody of the family is left."""
    _, errors = process.communicate(timeout=120)
    assert not psutil.wait_procs(family, timeout=30)[1], "orphans"
    return process.returncode, errors


def train(recipe: dict[str, Any]) -> None:
    """The whole run, for `run_ranks`: what a run that was stopped is compared with, or how it is finished."""
    from megalign.config.schema import Recipe
    from megalign.parallel.grid import destroy_grid
    from megalign.parallel.init import read_world
    from megalign.sft import sft

    sft(Recipe.model_validate(recipe), read_world(os.environ))
    destroy_grid()


def train_both(first: dict[str, Any], second: dict[str, Any]) -> None:
    """One run after the other in the same processes."""
    train(first)
    train(second)

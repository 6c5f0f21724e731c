"""The folder of a run, and what is true before its first step."""

from __future__ import annotations

import inspect
import json
import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megalign
from megalign.config.adapters import count_adapters, targets
from megalign.config.advice import warnings
from megalign.config.errors import ConfigError, Problem
from megalign.config.layout import effective_batch, layout_of
from megalign.config.load import dump_recipe
from megalign.config.rules import check_vocabulary
from megalign.config.schema import Recipe
from megalign.data.dataset import Dataset, build_datasets, make_tokenizer
from megalign.data.deal import describe_distribution, distribution
from megalign.data.formats import announcement
from megalign.data.rows import BadRow, Conversation
from megalign.data.source import with_text
from megalign.data.splits import listing, read_splits
from megalign.parallel.checkpoint import list_checkpoints, read_meta
from megalign.parallel.grid import Grid, create_grid
from megalign.parallel.init import World
from megalign.trainer.batches import pads_microbatches
from megalign.trainer.metrics import MetricsLogger, NullLogger
from megalign.trainer.trackers import open_trackers


class RunError(Exception):
    """The run folder cannot be used as the recipe asks; the message says what to do."""


class RunFolder:
    """Paths of a run and the small files around it. Only the logging rank writes."""

    def __init__(self, recipe: Recipe, grid: Grid):
        self.recipe, self.grid = recipe, grid
        self.path = Path(recipe.output)
        self.checkpoints = self.path / "checkpoints"
        self.tokenizer = self.path / "tokenizer"

    def open(self) -> Path | None:
        """Create the folder, or find the checkpoint to continue from.

        Raises RunError for a folder of something else, a checkpoint although `resume` is off, or a model
        other than the checkpoint's.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        found = list_checkpoints(self.checkpoints)
        if not found:
            strangers = [entry.name for entry in self.path.iterdir() if entry.name not in _OWN and not entry.name.endswith(".partial")]
            if strangers:
                raise RunError(f"output: {self.path} is not empty ({', '.join(sorted(strangers)[:3])} ...) and no run of ours; choose another folder")
            return None
        if not self.recipe.resume:
            raise RunError(f"output: {self.path} holds a run (last checkpoint {found[-1].name}); set resume=true to continue it, or choose another output")
        return found[-1]

    def datasets(
        self, resume_from: Path | None, build: Callable[[Recipe], tuple[Dataset, Dataset]] = build_datasets
    ) -> tuple[Dataset, Dataset]:
        """Read the data on every rank; a tokenizer that must be trained is trained on one, and kept for resumption."""
        recipe = self.recipe.model_copy(deep=True)
        if recipe.data.tokenizer.path is None and recipe.model.init_from is None:
            if self.grid.is_logger and resume_from is None:
                make_tokenizer(recipe, read_splits(recipe, take=with_text)[0].rows).save(self.tokenizer)
            dist.barrier()
            recipe.data.tokenizer.path = str(self.tokenizer)
        train, validation = build(recipe)
        check_vocabulary(self.recipe, train.tokenizer.vocab_size)
        if self.grid.is_logger and recipe.data.tokenizer.path != str(self.tokenizer):
            train.tokenizer.save(self.tokenizer)
        return train, validation

    def describe(self, train: Dataset, validation: Dataset, command: list[str]) -> None:
        """Write recipe.yaml, data.json and environment.json."""
        if not self.grid.is_logger:
            return
        (self.path / "recipe.yaml").write_text(dump_recipe(self.recipe))
        self.write("data.json", {"train": {**train.statistics, **self.dealing(train)}, "validation": validation.statistics})
        self.write("environment.json", environment(self.grid, self.recipe.train.seed, command))

    def dealing(self, train: Dataset) -> dict[str, Any]:
        """What padding and waiting cost, and the sources of a mixture, for data.json."""
        mixture = {part.name: {"weight": part.weight, "packs": part.stop - part.start} for part in train.parts}
        found = distribution(train, self.recipe, self.grid.data.size, padded=pads_microbatches(self.grid))
        return {"distribution": found, **({"mixture": mixture} if mixture else {})}

    def write(self, name: str, content: dict[str, Any]) -> None:
        """A JSON file, replaced in one step (logging rank only)."""
        if self.grid.is_logger:
            partial = self.path / f".{name}.partial"
            partial.write_text(json.dumps(content, indent=1))
            partial.rename(self.path / name)


_OWN = {"recipe.yaml", "environment.json", "data.json", "metrics.jsonl", "metrics.jsonl.tmp", "report.html.tmp", "samples.jsonl", "summary.json", "rewards.json"} | {
    "tokenizer",
    "logs",
    "tensorboard",
    "report.html",
    "checkpoints",
    "reference",
    "teacher",
}


def environment(grid: Grid, seed: int, command: list[str]) -> dict[str, Any]:
    """What a reader needs to know to run it again."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return {
        "megalign": megalign.__version__,
        "torch": torch.__version__,
        "megatron_core": version("megatron-core"),
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpus": gpus,
        "world_size": grid.world,
        "layout": grid.layout(),
        "git": _git(),
        "command": command,
        "seed": seed,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _git() -> str | None:
    """Commit of the source tree megalign runs from, with `+changes` if it has any; None when installed."""
    try:
        source = Path(megalign.__file__).parent
        done = subprocess.run(["git", "describe", "--always", "--dirty=+changes", "--abbrev=12"], cwd=source, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def identity(recipe: Recipe, train: Dataset) -> dict[str, Any]:
    """What must be equal for a checkpoint to mean the same: model shape, tokenizer, template, vocabulary, data."""
    model = recipe.model.model_dump(exclude={"preset", "init_from"})
    return {
        "model": model,
        "tokenizer": train.tokenizer.hash,
        "template": recipe.data.template,
        "template_hash": train.tokenizer.template.hash,
        "vocab_size": recipe.model.vocab_size or train.tokenizer.vocab_size,
        "training_rows": train.statistics["fingerprint"],
    }


def check_identity(checkpoint: Path, now: dict[str, Any]) -> None:
    """Raise RunError when a checkpoint was trained with another model, tokenizer or template."""
    saved = read_meta(checkpoint)["identity"]
    if saved["model"] != now["model"]:
        changed = [key for key in now["model"] if saved["model"].get(key) != now["model"][key]]
        detail = ", ".join(f"model.{key}: {saved['model'].get(key)!r} there, {now['model'][key]!r} here" for key in changed)
        raise RunError(f"{checkpoint} holds another model ({detail}); choose another output, or restore the recipe")
    if saved.get("heads") != now.get("heads"):
        raise RunError(f"{checkpoint} has other heads ({saved.get('heads')}, here {now.get('heads')}); choose another output, or restore rm.heads")
    for key in ("tokenizer", "template", "template_hash", "vocab_size"):
        if saved[key] != now[key]:
            raise RunError(f"{checkpoint} was trained with another {key.replace('_', ' ')} ({saved[key]!r}, here {now[key]!r}); text would be rendered into other tokens")
    if saved.get("lora") != now.get("lora"):
        there, here = ({} if each.get("lora") is None else each["lora"] for each in (saved, now))
        detail = ", ".join(f"lora.{key}: {there.get(key)!r} there, {here.get(key)!r} here" for key in {**there, **here} if there.get(key) != here.get(key))
        raise RunError(f"{checkpoint} has other adapters ({detail}); restore lora.*, or choose another output")
    if saved.get("base", {}).get("sha256") != now.get("base", {}).get("sha256"):
        raise RunError(f"{checkpoint} holds adapters of another base: the files of model.init_from have changed; restore them, or choose another output")
    if saved.get("reference") != now.get("reference"):
        raise RunError(
            f"{checkpoint} was trained against another reference: the files it was loaded from have changed, or the loss compares with none; "
            "restore model.init_from, dpo.reference_from and dpo.loss, or choose another output"
        )
    if saved.get("teacher") != now.get("teacher"):
        raise RunError(f"{checkpoint} was trained with another teacher: its files have changed, or distill.teacher names another; restore them, or choose another output")
    if saved["training_rows"] != now["training_rows"]:
        raise RunError(f"{checkpoint} was trained on other rows: its position in the data would mean nothing here; restore data.*, or choose another output")


def check_schedule(recipe: Recipe, steps: int) -> None:
    """Raise ConfigError when the warmup is longer than the run that the data make."""
    warmup = recipe.optimizer.lr_warmup_steps
    if warmup >= steps:
        rule = f"the data make a run of {steps} steps, and the warmup would never end"
        raise ConfigError([Problem("optimizer.lr_warmup_steps", rule, f"lower it, e.g. to {steps // 20}, or train longer", warmup)])


def announce(run: RunFolder, world: World, train: Dataset, log: NullLogger) -> None:
    """Say once what the run will do, what is unusual about it, and which rows were left out."""
    recipe, counts = run.recipe, train.statistics
    step = 0
    log.event(step, "batch", effective_batch(recipe, layout_of(recipe, world.size)))
    if recipe.lora.rank is not None:
        found = count_adapters(recipe.model, recipe.lora)
        log.event(step, "adapters", f"{found:,} parameters of rank {recipe.lora.rank} are trained, beside {', '.join(sorted(targets(recipe.model, recipe.lora)))}; the model is frozen")
    log.event(step, "data", describe_distribution(run.dealing(train)["distribution"]))
    for line in warnings(recipe, world.size):
        log.event(step, "warning", line)
    for source, facts in counts["sources"].items():
        log.event(step, "data", announcement(source, facts["format"]))
    left_out = counts["bad"] + counts["truncated_away"]
    if left_out:
        rows = [BadRow(**row) for row in counts["rejected"]]
        log.event(step, "warning", f"{left_out} of {counts['rows_read']} training rows are not used{listing(rows, 5)}")


def grid_of(recipe: Recipe, world: World) -> Grid:
    """The recipe's layout on this world (collective)."""
    sizes = inspect.signature(create_grid).parameters.keys()
    return create_grid(**recipe.parallel.model_dump(include=set(sizes)))


def open_logger(run: RunFolder, steps: int, resume_from: Path | None) -> NullLogger:
    """The record of the run on the logging rank, a silent one elsewhere."""
    if not run.grid.is_logger:
        return NullLogger()
    logging = run.recipe.logging
    resume_step = int(resume_from.name.split("_")[1]) if resume_from else None
    trackers = open_trackers(logging.trackers, run.recipe.name, run.recipe.model_dump(mode="json"), run.path / "logs", resume=resume_from is not None)
    return MetricsLogger(
        run.path, total_steps=steps, tensorboard=logging.tensorboard, log_interval=logging.log_interval, resume_step=resume_step, trackers=trackers
    )


def prompts_of(dataset: Dataset, count: int | None) -> list[Conversation]:
    """The first conversations of a data set, each up to its last assistant turn, the reference; plain text has none."""
    rows = []
    for row in dataset.kept:  # read from the files: no further than needed
        if count is not None and len(rows) == count:
            break
        if isinstance(row, Conversation):
            last = max(i for i, message in enumerate(row.messages) if message.role == "assistant")
            rows.append(replace(row, messages=row.messages[: last + 1]))
    return rows


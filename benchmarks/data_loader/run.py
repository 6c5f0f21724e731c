"""Is the data ever the bottleneck? Tokens a second of the loader alone, against the training step it feeds.

    python benchmarks/data_loader/run.py

The quickstart's model, rows and batch on one process (its layout divides model and batch, not the loader's work: each
rank cuts and collates only its own rows). Three loaders: packs from the cache, a mixture of two sources, a stream whose
windows are made; and what making the cache costs. Writes benchmarks/results/data_loader.json with the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from megalign.config.load import load_recipe
from megalign.config.schema import Recipe
from megalign.data.dataset import Dataset, build_datasets
from megalign.parallel.init import init, shutdown

HERE = Path(__file__).parent
QUICKSTART = HERE.parents[1] / "launch" / "recipes" / "quickstart.yaml"


def recipe_of(folder: Path, **data: Any) -> Recipe:
    """The quickstart on one rank, its cache in `folder`."""
    values = load_recipe(QUICKSTART).model_dump()
    values["parallel"] = {}
    values["data"] |= {"cache_dir": str(folder / "cache"), "validation_rows": 0, **data}
    return Recipe.model_validate(values)


def loader_rate(train: Dataset, recipe: Recipe, grid: Any, seconds: float) -> dict[str, float]:
    """Dealing, cutting out and collating whole steps for `seconds`, nothing else."""
    from megalign.trainer.batches import Batches

    batches = Batches(train, recipe, grid)
    tokens = steps = 0
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        tokens += batches.next_step()[1]
        steps += 1
    passed = time.perf_counter() - begun
    return {"tokens_per_second": tokens / passed, "seconds_per_step": passed / steps, "steps": steps}


def step_rate(train: Dataset, recipe: Recipe, grid: Any, warmup: int, steps: int) -> dict[str, float]:
    """Training steps as the trainer takes them, without their data."""
    from megalign.sft import token_loss
    from megalign.trainer.batches import Batches
    from megalign.trainer.engine import Engine
    from megalign.trainer.objective import Objective

    engine, batches = Engine(recipe, grid, train.tokenizer.vocab_size), Batches(train, recipe, grid)
    tokens, passed = 0, 0.0
    for step in range(warmup + steps):
        microbatches, count = batches.next_step()
        begun = time.perf_counter()
        engine.train_step(microbatches, Objective(token_loss), 1e-3, step + 1)
        if step >= warmup:
            passed, tokens = passed + time.perf_counter() - begun, tokens + count
    return {"tokens_per_second": tokens / passed, "seconds_per_step": passed / steps, "steps": steps}


def measure(seconds: float, steps: int) -> dict[str, Any]:
    """All rates, on one process with one thread."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = recipe_of(folder)
        build_datasets(recipe)[0].tokenizer.save(folder / "tokenizer")
        tokenizer = {"path": str(folder / "tokenizer")}
        begun = time.perf_counter()
        # Another option, so another entry: tokenised anew, with a tokenizer that is there.
        made, _ = build_datasets(recipe_of(folder, tokenizer=tokenizer, loss_on="completion"))
        making = time.perf_counter() - begun
        sources = [{"name": "a", "path": "grammar", "weight": 3}, {"name": "b", "path": "grammar", "weight": 1}]
        recipes = {
            "cache": recipe_of(folder, tokenizer=tokenizer),
            "mixture": recipe_of(folder, tokenizer=tokenizer, mixture=sources),
            "stream": recipe_of(folder, tokenizer=tokenizer, streaming=True, shuffle_window=2048),
        }
        world = init()
        torch.set_num_threads(1)
        from megalign.trainer.run import grid_of

        grid = grid_of(recipe, world)
        loaders = {}
        for kind, each in recipes.items():
            train, _ = build_datasets(each)
            loader_rate(train, each, grid, 1.0)  # makes the windows of the stream
            loaders[kind] = loader_rate(train, each, grid, seconds)
        train, _ = build_datasets(recipes["cache"])
        step = step_rate(train, recipes["cache"], grid, 2, steps)
        shutdown()
    return {
        "loader": loaders,
        "step": step,
        "times_faster_than_the_step": {kind: found["tokens_per_second"] / step["tokens_per_second"] for kind, found in loaders.items()},
        "making_the_cache": {"tokens_per_second": made.statistics["tokens"] / making, "rows": made.statistics["rows_kept"], "seconds": making},
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "threads": 1, "load_average": os.getloadavg()[0], "python": platform.python_version(), "torch": torch.__version__},
    }  # fmt: skip


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="a loader")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=HERE.parent / "results" / "data_loader.json")
    arguments = parser.parse_args()
    found = measure(arguments.seconds, arguments.steps)
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

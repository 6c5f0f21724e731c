"""From a command to its ranks: the recipe read and checked, a world started here or joined, the algorithm run in it."""

from __future__ import annotations

import errno
import gc
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from megalign.config.schema import Recipe

# What a command runs in each rank: `run(recipe, world)`. Imported there, for all of them import torch and megatron.
ALGORITHMS = {
    "sft": "megalign.sft:sft",
    "pretrain": "megalign.sft:sft",
    "dpo": "megalign.dpo:dpo",
    "dpo in rounds": "megalign.rounds:dpo_rounds",
    "kto": "megalign.kto:kto",
    "best-of-n": "megalign.best_of_n:best_of_n",
    "rso": "megalign.rso:rso",
    "rm": "megalign.rm:rm",
    "distill": "megalign.distill:distill",
}


def train(command: str, name: str, overrides: list[str], dry_run: bool) -> None:
    """Run `command` on a recipe, or print what it would do."""
    from megalign.config.load import load_recipe

    recipe = load_recipe(name, overrides)
    if dry_run:
        from megalign.dry_run import dry_run as print_plan

        print_plan(recipe, command=command)
        return
    # torch and megatron-core make a million objects as they are imported, and no garbage: looking for it takes a fifth of the time.
    gc.disable()
    try:
        _start(command, recipe)
    finally:
        gc.enable()


def sweep(name: str, overrides: list[str], betas: str) -> None:
    """DPO once for each beta of a list."""
    from megalign.config.layout import world_size_of
    from megalign.config.load import load_recipe
    from megalign.config.rules import check

    try:
        values = [float(beta) for beta in betas.split(",")]
    except ValueError:
        values = []
    if not values or min(values) <= 0:
        raise typer.BadParameter(f"{betas!r} is no list of numbers above 0; e.g. 0.05,0.1,0.3,1", param_hint="--betas")
    recipe = _resolved(load_recipe(name, overrides))
    ranks = world_size_of(recipe)
    check(recipe, ranks)

    def work(world: Any) -> None:
        from megalign.sweep import sweep as run

        run(recipe, values, world)

    run_ranks(ranks, Path(recipe.output), work)


def _resolved(recipe: Recipe) -> Recipe:
    """With the shape of what it starts from: how many ranks a layout needs depends on whether there are experts."""
    if recipe.model.init_from is None or not Path(recipe.model.init_from).is_dir():
        return recipe
    from megalign.models.resolve import resolve_model

    return resolve_model(recipe)


def _start(command: str, recipe: Recipe) -> None:
    from megalign.config.errors import ConfigError, Problem
    from megalign.config.layout import world_size_of
    from megalign.config.rules import check
    from megalign.parallel.init import in_distributed_launch

    recipe = _resolved(recipe)
    ranks = world_size_of(recipe)
    if not in_distributed_launch():
        check(recipe, ranks)
        try:
            Path(recipe.output).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError([Problem("output", f"this folder cannot be made ({error.strerror})", "choose another", recipe.output)]) from None

    def work(world: Any) -> None:
        in_rounds = command == "dpo" and recipe.rounds.count is not None
        module, name = ALGORITHMS["dpo in rounds" if in_rounds else command].split(":")
        run = getattr(importlib.import_module(module), name)
        gc.freeze()  # what was imported stays: the collector need not look through it again
        gc.enable()
        run(recipe, world)

    run_ranks(ranks, Path(recipe.output), work)


def run_ranks(ranks: int, folder: Path, work: Callable[[Any], None]) -> None:
    """Do `work` as a rank of the world that started us, or start the world on this machine."""
    from megalign.parallel.init import in_distributed_launch

    if not in_distributed_launch() and ranks > 1:
        from megalign.parallel.local import launch

        raise SystemExit(launch(sys.argv[1:], ranks, folder / "logs"))
    from megalign.parallel.init import init, shutdown
    from megalign.parallel.preempt import PREEMPTED, Preempted, leave_marker

    world = init()
    try:
        work(world)
    except Preempted as stop:
        leave_marker(stop)
        if world.rank == 0:
            print(f"\n{stop}", file=sys.stderr)
        shutdown()
        raise SystemExit(PREEMPTED) from None
    except KeyboardInterrupt:
        print("\nstopped. A training run continues from the last complete checkpoint when repeated.", file=sys.stderr)
        raise SystemExit(130) from None
    shutdown()


def is_expected(error: BaseException) -> bool:
    """True if the message is all a user needs: no traceback."""
    names = {"ConfigError", "DataError", "RunError", "CheckpointError", "TrainingStopped", "TrackerError", "ConversionError", "PlacementError", "AuditFailed", "Fp8Error"}
    files = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
    full_or_broken = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
    return full_or_broken or isinstance(error, files) or any(kind.__name__ in names for kind in type(error).__mro__)

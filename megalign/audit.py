"""`megalign audit RECIPE`: are copies of parameters reduced as they must be, on this recipe's layout?

No data is read: random tokens, a few steps. First the table of placements, then the probe (the gradient against
differences of the loss), then every step's comparison of all copies.
"""

from __future__ import annotations

from rich.console import Console
from torch import Tensor

from megalign.batch import Batch
from megalign.config.rules import check
from megalign.config.schema import Recipe
from megalign.losses import TokenLoss, cross_entropy_loss
from megalign.models.resolve import resolve_model
from megalign.parallel.audit.findings import Finding
from megalign.parallel.init import World
from megalign.parallel.placement import summary, table
from megalign.trainer.engine import Engine
from megalign.trainer.metrics import NullLogger
from megalign.trainer.objective import Objective
from megalign.trainer.probing import probe_engine, random_batches
from megalign.trainer.run import grid_of


class AuditFailed(Exception):
    """The audit found something; what, has been printed."""


def audit(recipe: Recipe, world: World, *, steps: int = 3, probe: bool = True) -> None:
    """Build the recipe's model on its layout, probe it, train `steps` steps on random tokens, comparing at each (collective).

    Raises ConfigError, PlacementError, and AuditFailed when anything is found.
    """
    recipe = resolve_model(recipe).model_copy(deep=True)
    recipe.audit.interval, recipe.audit.on_failure = 1, "warn"
    check(recipe, world.size)
    grid = grid_of(recipe, world)
    # Wide and unwrapped in a file, too: lines are to be searched.
    console = Console(highlight=False, soft_wrap=True, quiet=not grid.is_logger)
    vocab_size = recipe.model.vocab_size or recipe.data.tokenizer.vocab_size
    engine = Engine(recipe, grid, vocab_size)
    layout = " ".join(f"{name} {size}" for name, size in grid.layout().items())
    console.print(f"{recipe.name}: {layout}\n{table(engine.placements, grid.pipeline.group)}\n{summary(engine.placements)}\n", markup=False)

    found: list[Finding] = []
    if probe:
        found += probe_engine(engine, vocab_size)
        console.print("probe: gradients agree with the loss" if not found else f"probe: {len(found)} kinds of parameters have a wrong gradient")
    engine.audit.start(0, NullLogger())
    batches = random_batches(grid, vocab_size, max(2, grid.pipeline.size))
    for step in range(1, steps + 1):
        engine.train_step(batches, Objective(_loss), recipe.optimizer.lr, step)
    lines = [finding.text() for finding in found] + engine.audit.history
    console.print("\n".join([*lines, f"audit: {engine.audit.summary()}"]), markup=False)
    if lines:
        raise AuditFailed(f"{len(lines)} findings")


def _loss(output: Tensor, batch: Batch) -> TokenLoss:
    return cross_entropy_loss(*output)

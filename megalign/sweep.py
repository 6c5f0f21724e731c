"""One DPO run for each beta, and what beta buys: distance from the reference against margin.

    at the optimum, where a share p of the judges prefers the chosen answer:  margin = logit(p) / beta   (nats of log-ratio)

A smaller beta lets the policy go further (arXiv:2305.18290, eq. 4: beta weighs the KL divergence). All runs share one pass of
the reference; each is a run folder of its own (`output/beta_0.1`), resumed like any other. Written besides: sweep.json and
sweep.svg, the curves of all betas.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from megalign.config.errors import ConfigError, Problem
from megalign.config.preference import REFERENCE_FREE
from megalign.config.schema import Recipe
from megalign.dpo import dpo
from megalign.parallel.grid import destroy_grid
from megalign.parallel.init import World
from megalign.report.sheet import sheet
from megalign.report.svg import Curve

LAST = 10  # training steps that stand for a run without validation pairs


def sweep(recipe: Recipe, betas: Sequence[float], world: World) -> None:
    """Train with each beta, then write and print the comparison (collective).

    Raises ConfigError for a loss without reference or a recipe of rounds, and what `dpo` raises.
    """
    if recipe.dpo.loss in REFERENCE_FREE:
        raise ConfigError([Problem("dpo.loss", "a sweep over beta compares with a reference, and this loss has none", "choose another loss", recipe.dpo.loss)])
    if recipe.rounds.count is not None:
        rule = "a sweep compares betas on the same pairs, and rounds draw their own"
        raise ConfigError([Problem("rounds.count", rule, "leave out --betas, or this", recipe.rounds.count)])
    runs = [of_beta(recipe, beta) for beta in sorted(set(betas))]
    for run in runs:
        if not is_finished(Path(run.output)):
            dpo(run, world)
            destroy_grid()
        dist.barrier()
    if world.rank == 0:
        rows = [{"beta": run.dpo.beta, **outcome(Path(run.output), float(run.dpo.beta or 0))} for run in runs]
        folder = Path(recipe.output)
        (folder / "sweep.json").write_text(json.dumps(rows, indent=1))
        (folder / "sweep.svg").write_text(picture([(float(run.dpo.beta or 0), Path(run.output)) for run in runs]))
        show(rows, folder)


def of_beta(recipe: Recipe, beta: float) -> Recipe:
    """The recipe of one run of the sweep."""
    run = recipe.model_copy(deep=True)
    run.dpo.beta = beta
    run.output = str(Path(recipe.output) / f"beta_{beta:g}")
    run.dpo.reference_cache = recipe.dpo.reference_cache or str(Path(recipe.output) / "reference")
    return run


def is_finished(folder: Path) -> bool:
    summary = folder / "summary.json"
    return summary.exists() and json.loads(summary.read_text())["status"] == "finished"


def outcome(folder: Path, beta: float) -> dict[str, float]:
    """Of the last evaluation, else of the last training steps: nats of log-ratio, not rewards, which beta multiplies."""
    evaluations, steps = lines(folder, "eval"), lines(folder, "train")
    found = [{name.removeprefix("eval_"): value for name, value in evaluations[-1].items()}] if evaluations else steps[-LAST:]

    def mean(name: str) -> float:
        return statistics.fmean(row[name] for row in found)

    return {"drift": mean("logps/drift"), "margin": mean("rewards/margins") / beta, "accuracy": mean("rewards/accuracies"), "loss": mean("loss"), "chosen": mean("rewards/chosen") / beta}


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Those of metrics.jsonl."""
    return [row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if row["kind"] == kind]


def picture(runs: Sequence[tuple[float, Path]]) -> str:
    """Drift and margin over the training steps, a curve a beta."""

    def curves(value: Any) -> list[Curve]:
        return [
            Curve(f"beta {beta:g}", 1 + i % 4, [float(row["step"]) for row in rows], [value(row, beta) for row in rows])
            for i, (beta, rows) in enumerate((beta, lines(folder, "train")) for beta, folder in runs)
        ]

    drift, margin = curves(lambda row, beta: row["logps/drift"]), curves(lambda row, beta: row["rewards/margins"] / beta)
    return sheet("Distance from the reference and margin, by beta", [("distance from the reference, nats an answer", drift), ("margin of log-ratios, nats", margin)])


def show(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """The table on the terminal."""
    table = Table("beta", "drift, nats", "margin, nats", "chosen log-ratio", "ranked as judged", "loss", title=f"beta sweep: {folder / 'sweep.svg'}")
    for row in rows:
        table.add_row(f"{row['beta']:g}", f"{row['drift']:.2f}", f"{row['margin']:.2f}", f"{row['chosen']:+.2f}", f"{row['accuracy']:.0%}", f"{row['loss']:.4f}")
    Console(highlight=False).print(table)

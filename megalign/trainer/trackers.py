"""Weights & Biases and MLflow, where a recipe asks for them and they are installed (`logging.trackers`).

A tracker is a copy of `metrics.jsonl` for a dashboard: what it cannot take (a network that is down, a service that
refuses) is said once and never ends a run. A resumed run continues the tracker's run, whose id lies in
`logs/trackers.json`.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol


class TrackerError(Exception):
    """A tracker that the recipe names cannot be used; the message says what to do."""


class Tracker(Protocol):
    """What a dashboard is told. `run_id` is what `resume` takes later."""

    run_id: str

    def log(self, values: dict[str, float], step: int) -> None: ...

    def close(self, failed: bool) -> None: ...


class WandbTracker:
    """One run of Weights & Biases; project, entity and mode come from its own environment (WANDB_PROJECT, ...)."""

    def __init__(self, name: str, recipe: dict[str, Any], folder: Path, resume: str | None):
        wandb = _module("wandb")
        self.run = wandb.init(name=name, config=recipe, dir=str(folder), id=resume, resume="allow")
        self.run_id = str(self.run.id)
        # Steps repeated after a resume would be refused as W&B's own step; as a value they overwrite.
        self.run.define_metric("*", step_metric="step")

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log({**values, "step": step})

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class MlflowTracker:
    """One run of MLflow; server and experiment come from its own environment (MLFLOW_TRACKING_URI, ...)."""

    def __init__(self, name: str, recipe: dict[str, Any], folder: Path, resume: str | None):
        self.mlflow = _module("mlflow")
        run = self.mlflow.start_run(run_id=resume, run_name=None if resume else name)
        self.run_id = str(run.info.run_id)
        if resume is None:
            self.mlflow.log_params({key: str(value)[:500] for key, value in _flat(recipe)})

    def log(self, values: dict[str, float], step: int) -> None:
        self.mlflow.log_metrics(values, step=step)

    def close(self, failed: bool) -> None:
        self.mlflow.end_run(status="FAILED" if failed else "FINISHED")


TRACKERS: dict[str, Callable[[str, dict[str, Any], Path, str | None], Tracker]] = {"wandb": WandbTracker, "mlflow": MlflowTracker}


def open_trackers(names: list[str], name: str, recipe: dict[str, Any], folder: Path, *, resume: bool) -> dict[str, Tracker]:
    """Trackers by name. folder: the run's `logs`. Raises TrackerError for one that is absent or does not start."""
    file = folder / "trackers.json"
    known = json.loads(file.read_text()) if resume and file.exists() else {}
    opened: dict[str, Tracker] = {}
    for kind in names:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            opened[kind] = TRACKERS[kind](name, recipe, folder, known.get(kind))
        except TrackerError:
            raise
        except Exception as error:
            raise TrackerError(f"logging.trackers: {kind} does not start ({error}); log in, set its offline mode, or take it out of the list") from error
    if opened:
        file.write_text(json.dumps({kind: tracker.run_id for kind, tracker in opened.items()}))
    return opened


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise TrackerError(f"logging.trackers: {name} is not installed ({error}); pip install {name}, or take it out of the list") from None


def _flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in tree.items():
        pairs += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return pairs

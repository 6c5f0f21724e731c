"""Reading a run folder as it is found: complete, in progress, or killed while writing.

Nothing here raises over content. What is absent is empty, what is damaged is left out and named in
`RunRecord.damaged`, so that a report can be had of any run, above all of one that went wrong.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megalign.config.errors import ConfigError
from megalign.config.load import load_recipe

Row = dict[str, Any]


@dataclass
class RunRecord:
    """The contents of one run folder; `train` and `evals` are sorted by step, one row a step."""

    path: Path
    recipe_text: str = ""
    recipe: Row = field(default_factory=dict)
    environment: Row = field(default_factory=dict)
    data: Row = field(default_factory=dict)
    summary: Row = field(default_factory=dict)
    rewards: Row = field(default_factory=dict)  # of a reward model
    train: list[Row] = field(default_factory=list)
    evals: list[Row] = field(default_factory=list)
    events: list[Row] = field(default_factory=list)
    samples: list[Row] = field(default_factory=list)
    checkpoints: list[str] = field(default_factory=list)
    updated: float = 0.0  # seconds since the epoch at which metrics.jsonl was last written
    damaged: list[str] = field(default_factory=list)

    def section(self, name: str) -> Row:
        """A section of the recipe; empty if it is absent."""
        section = self.recipe.get(name)
        return section if isinstance(section, dict) else {}


def read_run(path: Path) -> RunRecord:
    """Everything that a report shows. Raises FileNotFoundError if `path` holds no run at all."""
    known = ("recipe.yaml", "metrics.jsonl", "summary.json", "environment.json", "data.json")
    if not any((path / name).is_file() for name in known):
        raise FileNotFoundError(f"{path} is not a run folder: it holds none of {', '.join(known)}")
    run = RunRecord(path)
    for name in ("environment", "data", "summary", "rewards"):
        setattr(run, name, _read_json(path / f"{name}.json", run.damaged))
    run.recipe_text, run.recipe = _read_recipe(path / "recipe.yaml", run.damaged)

    metrics, torn = read_jsonl(path / "metrics.jsonl")
    run.samples, torn_samples = read_jsonl(path / "samples.jsonl")
    for name, lines in (("metrics.jsonl", torn), ("samples.jsonl", torn_samples)):
        if lines:
            run.damaged.append(f"{name}: {lines} unreadable line{'s' if lines > 1 else ''} left out")
    run.train = _one_a_step(row for row in metrics if row.get("kind") == "train")
    run.evals = _one_a_step(row for row in metrics if row.get("kind") == "eval")
    blank = {"event": "note", "message": "", "step": None}
    run.events = [blank | row for row in metrics if row.get("kind") == "event"]
    if run.train and (run.summary.get("steps") or 0) < run.train[-1]["step"]:
        run.summary = {}  # of an earlier part of the run, which has been continued since
    if (path / "metrics.jsonl").is_file():
        run.updated = (path / "metrics.jsonl").stat().st_mtime
    # A checkpoint without its manifest was not finished.
    run.checkpoints = sorted(
        manifest.parent.name for manifest in path.glob("checkpoints/iter_*/manifest.json")
    )
    return run


def read_jsonl(path: Path) -> tuple[list[Row], int]:
    """Objects of a JSON-lines file and the number of lines that are none; absent: no rows."""
    rows: list[Row] = []
    unreadable = 0
    if not path.is_file():
        return rows, unreadable
    with path.open("rb") as file:
        for line in file:
            row = parse_line(line)
            if row is not None:
                rows.append(row)
            elif line.strip():
                unreadable += 1
    return rows, unreadable


def parse_line(line: bytes) -> Row | None:
    """The object of one line; None if it is torn, blank or no object."""
    try:
        row = json.loads(line)
    except ValueError:  # covers UnicodeDecodeError and JSONDecodeError
        return None
    return row if isinstance(row, dict) else None


def _one_a_step(rows: Any) -> list[Row]:
    """Rows by step; of two for the same step the later one counts."""
    latest = {row["step"]: row for row in rows if isinstance(row.get("step"), int)}
    return [latest[step] for step in sorted(latest)]


def _read_json(path: Path, damaged: list[str]) -> Row:
    if not path.is_file():
        return {}
    row = parse_line(path.read_bytes())
    if row is None:
        damaged.append(f"{path.name}: not a JSON object")
    return row or {}


def _read_recipe(path: Path, damaged: list[str]) -> tuple[str, Row]:
    """The text and the full recipe; one that this version refuses is shown as it stands."""
    if not path.is_file():
        return "", {}
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        return text, load_recipe(path).model_dump(mode="json")
    except ConfigError:
        pass
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError as error:
        damaged.append(f"{path.name}: not YAML ({str(error).splitlines()[0]})")
        return text, {}
    return text, recipe if isinstance(recipe, dict) else {}

"""One run folder -> one self-contained report.html.

The page needs no network: style, script and drawings are inside, and its content security policy
allows nothing else. Everything that comes from data is escaped by jinja2.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2

from megalign.config.schema import Recipe
from megalign.report import format as spell
from megalign.report.curves import build_charts
from megalign.report.experts import HEAT_LABELS, build_expert_load
from megalign.report.findings import command_line, commands, findings
from megalign.report.headline import describe_model, headline, run_status
from megalign.report.rewards import heads_shown
from megalign.report.run_folder import Row, RunRecord, read_run

HERE = Path(__file__).parent
SPLIT_KEYS = ("rows_read", "rows_kept", "bad", "truncated", "truncated_away", "tokens", "packs", "fill_share")
SOURCE_KEYS = ("format", "rows_read", "rows_kept", "bad")
REJECTED_KEYS = ("source", "line", "reason")
MOST_SAMPLES, MOST_EVENTS, MOST_TEXT = 24, 120, 4000


def build_report(output: Path) -> Path:
    """Write `output/report.html` and return its path.

    Works on a finished, running, stopped or killed run; what a run lacks is left out. Raises
    FileNotFoundError if `output` holds no run.
    """
    output = Path(output)
    page = render_report(read_run(output), now=time.time())
    path = output / "report.html"
    unfinished = output / "report.html.tmp"
    unfinished.write_text(page, encoding="utf-8")
    os.replace(unfinished, path)  # a browser never sees half a page
    return path


def render_report(run: RunRecord, *, now: float) -> str:
    """The page of a run as HTML; `now` (seconds since the epoch) dates it and tells running from killed."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        count=spell.count, percent=spell.percent, number=spell.number, duration=spell.duration, clip=_clip
    )
    script = (HERE / "report.js").read_text(encoding="utf-8")
    status, reason = run_status(run, now)
    charts, load = build_charts(run), build_expert_load(run.train)
    return environment.get_template("template.html").render(
        title=run.recipe.get("name") or run.path.name,
        status=status,
        reason=reason,
        built=datetime.fromtimestamp(now, timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        description=describe_model(run),
        tiles=headline(run),
        charts=charts,
        load=load,
        heat_labels=HEAT_LABELS,
        heads=heads_shown(run),
        splits=_splits(run.data),
        samples=_samples(run.samples),
        matches=_matches(run.samples),
        changes=_changes(run.recipe),
        recipe=run.recipe_text,
        environment=_environment(run.environment),
        events=run.events[-MOST_EVENTS:],
        events_hidden=max(0, len(run.events) - MOST_EVENTS),
        checkpoints=run.checkpoints,
        damaged=run.damaged,
        findings=findings(run),
        commands=commands(run, status),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        page_data={"charts": [chart.data for chart in charts], "heat": load.data if load else [], "layers": load.layers if load else []},
    )


def _splits(data: Row) -> list[tuple[str, Row]]:
    """Statistics by split, with every key that the page shows; a flat file is that of training."""
    splits = [(name, part) for name, part in data.items() if isinstance(part, dict) and "rows_read" in part]
    splits = splits or ([("train", data)] if "rows_read" in data else [])
    return [(name, _complete(split)) for name, split in splits]


def _complete(split: Row) -> Row:
    sources = (split.get("sources") or {}).items()
    return {
        **dict.fromkeys((*SPLIT_KEYS, "sequence_length")),
        **split,
        "scored_tokens": split.get("scored_tokens") or 0,
        "sources": {source: {**dict.fromkeys(SOURCE_KEYS), **counts} for source, counts in sources},
        "rejected": [{**dict.fromkeys(REJECTED_KEYS), **row} for row in split.get("rejected") or []],
    }


def _samples(samples: list[Row]) -> list[tuple[int, list[Row]]]:
    """(step, samples), the latest step first, with a turn list whatever form the prompt has."""
    steps: dict[int, list[Row]] = {}
    for sample in samples[-MOST_SAMPLES:]:
        prompt = sample.get("prompt")
        turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        turns = [turn for turn in turns if isinstance(turn, dict)]
        sample = {"exact_match": None, "reference": None, "response": None, "chosen": None, "rejected": None, "judged": None, "reward": None, **sample, "prompt": turns}
        steps.setdefault(sample.get("step", 0), []).append(sample)
    return sorted(steps.items(), reverse=True)


def _matches(samples: list[Row]) -> tuple[int, int]:
    judged = [sample for sample in samples if sample.get("exact_match") is not None]
    return sum(bool(sample["exact_match"]) for sample in judged), len(judged)


def _changes(recipe: Row) -> list[tuple[str, Any, Any]]:
    """(key, value, default) of every key that is not at its default."""
    defaults = dict(_flat(Recipe.model_validate({}).model_dump(mode="json")))
    return [
        (key, _yaml(value), _yaml(defaults.get(key))) for key, value in _flat(recipe) if value != defaults.get(key)
    ]


def _yaml(value: Any) -> Any:
    """A scalar as a recipe spells it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else value


def _flat(tree: Row, prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in tree.items():
        pairs += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return pairs


def _environment(environment: Row) -> list[tuple[str, str]]:
    told = {key.replace("_", " "): _words(value) for key, value in environment.items()}
    if "command" in told:
        told["command"] = command_line(environment)
    return list(told.items())


def _words(value: Any) -> str:
    """A value of environment.json in one line; equal items of a list are counted (8 x one GPU)."""
    if value is None or value == []:
        return spell.MISSING
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(
            name if times == 1 else f"{times} x {name}" for name, times in Counter(map(str, value)).items()
        )
    return str(value)


def _clip(text: Any) -> str:
    text = "" if text is None else str(text)
    hidden = len(text) - MOST_TEXT
    return text if hidden <= 0 else f"{text[:MOST_TEXT]} … ({hidden:,} characters more)"

"""The end of a reward model's run: what its heads say of rows they have not seen, and what rewards are measured against.

    rewards.json        of the run: each head's measures with intervals, and its normalisation
    reward.json         beside the checkpoint it was made with: the normalisation, which scoring reads
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megalign.config.schema import HeadConfig
from megalign.data.dataset import Dataset
from megalign.data.judgements import JudgedRows, KeptRows, conversations
from megalign.data.labels import OBSERVED
from megalign.data.rows import Message, PreferencePair
from megalign.models.sequences import document_values
from megalign.parallel.checkpoint import describe_files, list_checkpoints, write_manifest
from megalign.parallel.init import device
from megalign.parallel.schedule import from_last_stage, sum_over
from megalign.rewards import measures
from megalign.rewards.heads import PAIRED, columns_of, probabilities, reading
from megalign.rewards.normalise import Normalisation
from megalign.trainer.batches import Batches
from megalign.trainer.engine import Engine
from megalign.trainer.run import RunFolder

NORMALISATION = "reward.json"


def score_rows(engine: Engine, dataset: Dataset) -> np.ndarray:
    """[P, 2, H] what the heads say of both sides of every row (0 where there is one side), on every rank (collective)."""
    grid, recipe = engine.grid, engine.recipe
    width = sum(shape.width for shape in (engine.heads or {}).values())
    found = torch.zeros(len(dataset), 2, width, dtype=torch.float64, device=device())
    for microbatches in Batches(dataset, recipe, grid, evaluation=True).one_pass() if len(dataset) else ():
        for batch, values in zip(microbatches, engine.score(microbatches, lambda output, batch: document_values(output, batch, grid))):
            if batch.values:
                side = (batch.values["side"] < 0).long()
                found[batch.values["row"].long(), side] = values.double()
    return from_last_stage(sum_over(found, grid.data.group), grid).cpu().numpy()


def finish_reward_model(engine: Engine, run: RunFolder, train: Dataset, validation: Dataset, step: int) -> dict[str, Any]:
    """Measure every head on the validation rows, normalise rewards, keep both (collective).

    Returns what rewards.json says of each head; nothing on ranks that do not write it.
    """
    recipe = run.recipe
    held_out = score_rows(engine, validation)
    reference = validation if len(validation) else train
    said = held_out if len(validation) else score_rows(engine, train)
    if not run.grid.is_logger:
        return {}
    heads, columns = recipe.rm.heads, columns_of(recipe.rm.heads)
    found: dict[str, Any] = {"step": step, "heads": {}, "reference": "validation rows" if len(validation) else "training rows"}
    for name, head in heads.items():
        entry: dict[str, Any] = {"loss": head.loss, "label": head.label or name}
        if len(validation):
            entry["held_out"] = measure_head(name, head, held_out[..., columns[name]], validation, resamples=recipe.rm.bootstrap)
        try:
            entry["normalisation"] = vars(Normalisation.of(answers_of(said[..., columns[name]], reference, head)))
        except ValueError as error:  # rewards that are all equal: a model that has learnt nothing
            entry["normalisation"], entry["not_normalised"] = None, str(error)
        found["heads"][name] = _finite(entry)
    run.write("rewards.json", found)
    keep_normalisation(checkpoint_of(run), {name: entry["normalisation"] for name, entry in found["heads"].items()})
    write_samples(run, reference, said[..., columns[next(iter(heads))]], next(iter(heads.values())), step)
    return found["heads"]


def _finite(value: Any) -> Any:
    """NaN (a correlation of what does not vary) as null."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def checkpoint_of(run: RunFolder) -> Path | None:
    """The checkpoint whose weights the model has now."""
    best = json.loads((run.path / "summary.json").read_text()).get("best_checkpoint") if run.recipe.train.load_best_at_end else None
    kept = list_checkpoints(run.checkpoints)
    return next((path for path in kept if path.name == best), kept[-1] if kept else None)


def keep_normalisation(checkpoint: Path | None, normalisation: dict[str, Any]) -> None:
    """Put it beside the weights; the manifest then names it as well."""
    if checkpoint is None:
        return
    partial = checkpoint / f"{NORMALISATION}.partial"
    partial.write_text(json.dumps(normalisation, indent=1))
    partial.rename(checkpoint / NORMALISATION)
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    write_manifest(checkpoint, {**files, **describe_files(checkpoint, [NORMALISATION])})


def answers_of(values_P2W: np.ndarray, dataset: Dataset, head: HeadConfig) -> np.ndarray:
    """[N] the head's readings of all answers of a data set."""
    rows = dataset.rows
    assert isinstance(rows, JudgedRows)
    return reading(head, np.concatenate([values_P2W[:, 0], values_P2W[rows.paired, 1]]))


def measure_head(name: str, head: HeadConfig, values_P2W: np.ndarray, dataset: Dataset, *, resamples: int) -> dict[str, Any]:
    """The measures that fit the head's loss, over the rows whose label it knows."""
    rows = dataset.rows
    assert isinstance(rows, JudgedRows)
    labels = rows.columns[name]
    if head.loss == PAIRED:
        known = ~np.isnan(labels[:, 0]) & rows.paired
        if not known.any():
            return {"pairs": 0}
        sign, said = labels[known, 0], reading(head, values_P2W[known].reshape(-1, values_P2W.shape[-1])).reshape(-1, 2)
        lengths = rows.lengths[known]
        return measures.measure_pairs((said[:, 0] - said[:, 1]) * sign, (lengths[:, 0] - lengths[:, 1]) * sign)
    known = ~np.isnan(labels) & np.stack([np.ones(len(rows), bool), rows.paired], -1)
    if not known.any():
        return {"rows": 0}
    values, label = values_P2W[known], labels[known]
    match head.loss:
        case "binary":
            return measures.measure_binary(reading(head, values), label, resamples=resamples)
        case "classification":
            return measures.measure_classes(probabilities(head, values), label)
        case "exponential" | "weibull":
            return measures.measure_times(reading(head, values), label, rows.columns[name + OBSERVED][known], resamples=resamples)
        case _:
            return measures.measure_numbers(reading(head, values), label, resamples=resamples)


def write_samples(run: RunFolder, dataset: Dataset, values_P2W: np.ndarray, head: HeadConfig, step: int) -> None:
    """The first `train.sample_prompts` pairs with their rewards, for the report."""
    assert isinstance(dataset.kept, KeptRows)
    lines: list[str] = []
    for row, values in zip(dataset.kept.judgements(), values_P2W):
        if len(lines) == run.recipe.train.sample_prompts:
            break
        if isinstance(row, PreferencePair):
            first, second = reading(head, values)
            sides = {"chosen": _side(row.chosen.messages, first), "rejected": _side(row.rejected.messages, second)}
        else:
            sides = {"response": conversations(row)[0].messages[-1].content, "reward": round(float(reading(head, values[:1])[0]), 4)}
        prompt = [{"role": message.role, "content": message.content} for message in row.prompt]
        lines.append(json.dumps({"step": step, "prompt": prompt, **sides}, ensure_ascii=False))
    (run.path / "samples.jsonl").write_text("".join(line + "\n" for line in lines))


def _side(messages: Sequence[Message], reward: float) -> dict[str, Any]:
    return {"text": "\n".join(message.content for message in messages), "reward": round(float(reward), 4)}


def summary_line(entry: dict[str, Any]) -> str:
    """A head's measures in a sentence."""
    held_out = entry.get("held_out") or {}
    told = []
    for name in ("accuracy", "auc", "pearson", "spearman", "r2", "concordance"):
        if isinstance(value := held_out.get(name), float) and not math.isnan(value):
            low, high = held_out.get(f"{name}_interval", (math.nan, math.nan))
            told.append(f"{name} {value:.3f} [{low:.3f}, {high:.3f}]")
    told += [f"calibration error {held_out['calibration_error']:.3f}"] if "calibration_error" in held_out else []
    return ", ".join(told) or "nothing held out"


"""A reward model's heads in the report: what was measured on rows it has not seen, with intervals."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megalign.report.format import count, number, percent
from megalign.report.run_folder import Row, RunRecord

# key of rewards.json, name, spelling; in the order of the page
MEASURES = (
    ("pairs", "Pairs", count),
    ("rows", "Rows", count),
    ("accuracy", "Accuracy", percent),
    ("base_rate", "Base rate: the commonest answer", percent),
    ("length_only_accuracy", "Always the longer answer", percent),
    ("auc", "AUC", number),
    ("pearson", "Pearson", number),
    ("spearman", "Spearman", number),
    ("r2", "R2", number),
    ("mean_absolute_error", "Mean absolute error", number),
    ("concordance", "Concordance", number),
    ("censored_share", "Censored", percent),
    ("mean_predicted", "Mean time predicted", number),
    ("mean_by_exposure", "Mean time by exposure", number),
    ("margin", "Mean margin", number),
    ("length_correlation", "Correlation of margin and length", number),
    ("calibration_error", "Calibration error (ECE)", number),
)


@dataclass(frozen=True)
class HeadShown:
    """A head, its measures as (name, value, interval or ""), and its reliability as (said, seen, rows)."""

    name: str
    loss: str
    measures: list[tuple[str, str, str]]
    reliability: list[tuple[str, str, str]] = field(default_factory=list)
    normalisation: str = ""


def heads_shown(run: RunRecord) -> list[HeadShown]:
    """Of rewards.json; none where the run has no such file."""
    heads = run.rewards.get("heads")
    return [_shown(name, entry) for name, entry in heads.items() if isinstance(entry, dict)] if isinstance(heads, dict) else []


def _shown(name: str, entry: Row) -> HeadShown:
    held_out: dict[str, Any] = entry.get("held_out") or {}
    measures = []
    for key, told, spell in MEASURES:
        if held_out.get(key) is not None:
            interval = held_out.get(f"{key}_interval")
            measures.append((told, spell(held_out[key]), f"{spell(interval[0])} to {spell(interval[1])}" if interval else ""))
    reliability = [(percent(said), percent(seen), count(rows)) for said, seen, rows in held_out.get("reliability") or []]
    kept = entry.get("normalisation")
    normalisation = f"(reward - {number(kept['mean'])}) / {number(kept['std'])}, from {count(kept['count'])} answers" if kept else ""
    return HeadShown(name, str(entry.get("loss", "")), measures, reliability, normalisation)

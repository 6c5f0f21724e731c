"""Whole runs of `rm` inside ranks that a fork server started; what they wrote is read by the test."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import dpo_checks
import sft_checks

LONGER = {"max_steps": 40, "global_batch_size": 8, "micro_batch_size": 4}
WARM, COLD = "kind gladly thanks bright warm gentle happy fine".split(), "nasty never gloom cold bitter rude grim awful".split()


def recipe(output: Path, *, parallel: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A tiny dense model on 24 pairs of the built-in grammar; `changes`: section=dict."""
    return dpo_checks.recipe(output, parallel=parallel, **changes)


def train(recipe: dict[str, Any]) -> str:
    """Run it on this world; return "" or the error. A recipe with `dpo`: {} first is of supervised training."""
    from megalign.config.schema import Recipe
    from megalign.parallel.grid import destroy_grid
    from megalign.parallel.init import read_world
    from megalign.rm import rm
    from megalign.sft import sft

    run = sft if recipe["name"] == "sft" else rm
    try:
        run(Recipe.model_validate(recipe), read_world(os.environ))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        destroy_grid()
    return ""


def train_all(recipes: list[dict[str, Any]]) -> list[str]:
    """Several runs one after the other in the same processes."""
    return [train({"name": "rm", **recipe}) for recipe in recipes]


def score(jobs: list[tuple[str, str, list[str], str]]) -> list[str]:
    """`megalign rm score` of (checkpoints separated by commas, file, overrides, output)."""
    from megalign.parallel.grid import destroy_grid
    from megalign.parallel.init import read_world
    from megalign.scoring import score_file

    failures = []
    for checkpoints, file, overrides, output in jobs:
        try:
            score_file([Path(part) for part in checkpoints.split(",")], Path(file), overrides, read_world(os.environ), output=Path(output))
            failures.append("")
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}")
            destroy_grid()
    return failures


def merged(run: str, file: str, folder: str) -> tuple[list[list[int]], list[float], str]:
    """(tokens of the answers that fit, their values with the adapters on, why they cannot be exported alone); and the export, merged."""
    from megalign.data.rows import Conversation, Example
    from megalign.parallel.grid import destroy_grid
    from megalign.parallel.init import read_world
    from megalign.scoring import RewardScorer, answers_in
    from megalign.serving import write_hugging_face

    world = read_world(os.environ)
    scorer = RewardScorer.load(Path(run), [], world)
    dialogues = [dialogue for _, dialogue in answers_in(Path(file)) if isinstance(dialogue, Conversation)]
    ids = [example.input_ids for example in scorer.encode(dialogues) if isinstance(example, Example)]
    values = scorer.values(ids)[:, 0].tolist()
    destroy_grid()
    refused = ""
    try:
        write_hugging_face(Path(run), Path(folder + "-adapter"), "float32", world, adapter=True)
    except Exception as error:
        refused = f"{type(error).__name__}: {error}"
    destroy_grid()
    write_hugging_face(Path(run), Path(folder), "float32", world)
    destroy_grid()
    return [one.tolist() for one in ids], values, refused


def audit(jobs: list[tuple[Any, ...]]) -> list[str]:
    """`megalign rm audit` of (checkpoint, file, head, output, perhaps the policy's samples): what it raises."""
    from megalign.parallel.grid import destroy_grid
    from megalign.parallel.init import read_world
    from megalign.reward_audit import audit_rewards

    said = []
    for checkpoint, file, head, output, *policy in jobs:
        try:
            audit_rewards(Path(checkpoint), Path(file) if file else None, [], read_world(os.environ), head=head, rows=30, output=Path(output), policy=Path(policy[0]) if policy else None)
            said.append("")
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
        destroy_grid()
    return said


curve, metrics = sft_checks.curve, sft_checks.metrics

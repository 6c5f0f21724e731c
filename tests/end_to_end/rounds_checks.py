"""A model that answers in several ways, and rounds of DPO on it, inside ranks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from megalign.data.rows import Conversation

ANSWERS = ("Yes.", "Yes, yes.", "Yes, yes, yes.", "Yes, yes, yes, yes.")


def brevity(row: Conversation, answer: str) -> float:
    """The scorer: fewer words are better."""
    return -float(len(answer.split()))


def start(folder: Path) -> dict[str, Any]:
    """A recipe of a model that gives each answer as often, whatever the question."""
    rows = [{"messages": [{"role": "user", "content": f"Is it {n}?"}, {"role": "assistant", "content": answer}]} for n in range(16) for answer in ANSWERS]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "output": str(folder / "start"),
        "model": dict(num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2),
        "data": dict(train=str(folder / "rows.jsonl"), validation_rows=4, sequence_length=128, tokenizer=dict(vocab_size=300)),
        "optimizer": dict(lr=1e-2, lr_warmup_steps=4),
        "train": dict(micro_batch_size=4, global_batch_size=8, max_steps=40, sample_prompts=0),
        "logging": dict(tensorboard=False, report=False),
    }  # fmt: skip


def rounds(folder: Path, output: Path, count: int, **changes: Any) -> dict[str, Any]:
    """A recipe of rounds on it."""
    recipe = start(folder)
    recipe.pop("model")
    return {
        **recipe,
        "output": str(output),
        "model": {"init_from": str(folder / "start")},
        "data": {**recipe["data"], "tokenizer": {}},
        "optimizer": dict(lr=1e-3, weight_decay=0.0),
        "train": dict(micro_batch_size=4, global_batch_size=4, max_steps=12, sample_prompts=1, sample_tokens=8),
        "rounds": {**dict(count=count, prompts=16, n=4, max_new_tokens=24, scorer=f"{__file__}:brevity"), **changes},
    }


def train_all(recipes: list[dict[str, Any]], stopped: dict[int, Path]) -> list[str]:
    """Each recipe in turn: "" or the error; of those in `stopped` (number: run folder) the step at which that run was left."""
    from megalign.config.schema import Recipe
    from megalign.parallel.grid import destroy_grid
    from megalign.parallel.init import read_world
    from megalign.rounds import dpo_rounds
    from megalign.sft import sft

    said = []
    for number, recipe in enumerate(recipes):
        try:
            (dpo_rounds if "rounds" in recipe else sft)(Recipe.model_validate(recipe), read_world(os.environ))
            said.append(f"at step {json.loads((stopped[number] / 'summary.json').read_text())['steps']}" if number in stopped else "")
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
        finally:
            destroy_grid()
    return said

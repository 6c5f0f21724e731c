"""Rounds of `best_of_n`, `rso` and `distill` inside ranks that a fork server started; what they wrote is read by the test."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import sft_checks

MODEL = dict(num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, num_query_groups=2)


def start(output: Path, **changes: Any) -> dict[str, Any]:
    """A tiny dense model trained a little on the built-in grammar: what the others start from."""
    base = sft_checks.recipe(output)
    base |= {"model": MODEL, "optimizer": dict(lr=5e-3, lr_warmup_steps=5)}
    base["data"] |= dict(max_rows=400, validation_rows=12, sequence_length=192, tokenizer=dict(vocab_size=320))
    base["train"] |= dict(micro_batch_size=4, global_batch_size=8, max_steps=90, sample_prompts=0)
    return {**base, **changes}


def recipe(output: Path, begin: Path, *, parallel: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Something that starts from the run `begin`; `changes`: section=dict."""
    base: dict[str, Any] = {
        "output": str(output),
        "model": {"init_from": str(begin)},
        "parallel": parallel or {},
        "data": dict(max_rows=60, validation_rows=12, sequence_length=192),
        "optimizer": dict(lr=2e-3, lr_warmup_steps=2),
        "train": dict(micro_batch_size=4, global_batch_size=8, max_steps=12, sample_prompts=2, sample_tokens=40),
        "logging": dict(tensorboard=False, report=False),
    }  # fmt: skip
    for section, values in changes.items():
        base[section] = {**base.get(section, {}), **values} if isinstance(values, dict) else values
    return base


def work(jobs: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """("sft", recipe), ("best_of_n", recipe), ("rounds.dpo_rounds", recipe), ... one after the other in the same processes; "" or the error of each."""
    import importlib

    from megalign.config.schema import Recipe
    from megalign.parallel.grid import destroy_grid
    from megalign.parallel.init import read_world

    found = []
    for command, job in jobs:
        try:
            module, _, function = command.partition(".")
            getattr(importlib.import_module(f"megalign.{module}"), function or module)(Recipe.model_validate(job), read_world(os.environ))
            found.append("")
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
        finally:
            destroy_grid()
    return found


def vowels(row: Any, answer: str) -> float:
    """A verifier of the test's own: words that begin with a vowel."""
    return float(sum(word[:1].lower() in "aeiou" for word in answer.split()))


curve, metrics = sft_checks.curve, sft_checks.metrics

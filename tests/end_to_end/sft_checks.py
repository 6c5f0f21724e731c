"""Whole runs of `sft` inside ranks that a fork server started; what they wrote is read by the test."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

MOE_4 = {
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "expert_model_parallel_size": 2,
    "sequence_parallel": True,
}


def recipe(output: Path, *, parallel: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A tiny MoE on 40 dialogues; `changes`: section=dict."""
    base: dict[str, Any] = {
        "output": str(output),
        "model": dict(
            num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, num_moe_experts=4,
            moe_ffn_hidden_size=24, moe_aux_loss_coeff=0.01,
        ),
        "parallel": parallel or {},
        "data": dict(max_rows=30, validation_rows=4, sequence_length=128, tokenizer=dict(vocab_size=300)),
        "optimizer": dict(lr=3e-3, lr_warmup_steps=2),
        "train": dict(micro_batch_size=1, global_batch_size=4, max_steps=10, sample_prompts=1, sample_tokens=4),
        "logging": dict(tensorboard=False, report=False),
    }  # fmt: skip
    for section, values in changes.items():
        base[section] = {**base[section], **values} if isinstance(values, dict) else values
    return base


def train(recipe: dict[str, Any]) -> str:
    """Run it on this world; return "" or the error."""
    from megalign.config.schema import Recipe
    from megalign.parallel.grid import destroy_grid
    from megalign.parallel.init import read_world
    from megalign.sft import sft

    try:
        sft(Recipe.model_validate(recipe), read_world(os.environ))
        destroy_grid()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def train_twice(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """One run after the other in the same processes."""
    return [train(first), train(second)]


def train_all(recipes: list[dict[str, Any]]) -> list[str]:
    """Several runs one after the other in the same processes."""
    return [train(recipe) for recipe in recipes]


def train_with_nan(recipe: dict[str, Any], step: int, microbatch: int) -> str:
    """The same with the loss of one microbatch of one step replaced by NaN."""
    from megalign import sft as module

    calls = {"count": 0}
    original = module.token_loss

    def poisoned(output: Any, batch: Any) -> Any:
        result = original(output, batch)
        calls["count"] += 1
        if calls["count"] == (step - 1) * 4 + microbatch + 1:
            return type(result)(result.sum * float("nan"), result.count, result.metrics)
        return result

    module.token_loss = poisoned
    return train(recipe)


def train_with_full_disk(recipe: dict[str, Any], largest_file: int) -> str:
    """The same where no file may grow past `largest_file` bytes, as on a full disk."""
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    return train(recipe)


def metrics(output: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Lines of metrics.jsonl of one kind."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def curve(output: Path, *names: str) -> list[tuple[Any, ...]]:
    """(step, values) of every training step."""
    return [(line["step"], *(line[name] for name in names)) for line in metrics(output)]

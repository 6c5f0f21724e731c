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
        base[section] = {**base.get(section, {}), **values} if isinstance(values, dict) else values
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


def train_and_compare(recipe: dict[str, Any]) -> tuple[str, list[str], list[str]]:
    """Run it; the error, and (on rank 0) the names of the parameters that moved and of those that did not."""
    from megalign.config.schema import Recipe
    from megalign.models.weights import stream_full
    from megalign.parallel.checkpoint import list_checkpoints
    from megalign.parallel.grid import destroy_grid
    from megalign.parallel.init import read_world
    from megalign.trainer.engine import Engine
    from megalign.trainer.run import grid_of

    error = train(recipe)
    if error:
        return error, [], []
    config = Recipe.model_validate(recipe)
    grid = grid_of(config, read_world(os.environ))
    engine = Engine(config, grid, 300, train=False)
    before = {name: full.clone() for name, full in stream_full(engine.models, grid)}
    engine.load(list_checkpoints(Path(config.output) / "checkpoints")[-1], weights_only=True)
    after = dict(stream_full(engine.models, grid))
    destroy_grid()
    moved = [name for name in before if not before[name].equal(after[name])]
    return "", moved, [name for name in before if name not in moved]


def train_and_average(recipe: dict[str, Any], output: str) -> dict[str, float]:
    """Run it, average its last two checkpoints; per parameter (rank 0) the largest distance of the result from their mean, and between them."""
    import megalign.average
    from megalign.models.weights import stream_full
    from megalign.parallel.checkpoint import list_checkpoints
    from megalign.parallel.grid import destroy_grid
    from megalign.parallel.init import read_world
    from megalign.serving import load_for_inference

    assert train(recipe) == ""
    world = read_world(os.environ)
    layout = [f"parallel.{key}={value}" for key, value in recipe["parallel"].items()] + [f"train.global_batch_size={world.size}"]
    result = megalign.average.average(Path(recipe["output"]), Path(output), 2, world, layout)
    destroy_grid()
    weights = []
    for path in (*list_checkpoints(Path(recipe["output"]) / "checkpoints")[-2:], result):
        engine, _ = load_for_inference(path, layout, world)
        weights.append({name: full.clone() for name, full in stream_full(engine.models, engine.grid)})
        destroy_grid()
    one, two, mean = weights
    off = max((float((mean[name] - (one[name] + two[name]) / 2).abs().max()) for name in one), default=0.0)
    return {"off": off, "apart": max((float((one[name] - two[name]).abs().max()) for name in one), default=1.0)}


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

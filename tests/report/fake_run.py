"""Run folders as a trainer leaves them, without a trainer: finished or not, dense or MoE, small or huge."""

import json
import math
import random
from pathlib import Path

import yaml

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def make_run(
    folder: Path,
    *,
    steps=300,
    layers=4,
    experts=8,
    finished=True,
    evals=True,
    samples=True,
    overfit=False,
    hot=0.0,
) -> Path:
    """Write a run folder; `experts` 0 is a dense model, `hot` is how strongly expert 1 of layer 0 collapses."""
    rng = random.Random(0)
    folder.mkdir(parents=True)
    recipe = {
        "name": "grammar-moe" if experts else "grammar-dense",
        "output": "runs/grammar",
        "model": {"num_layers": layers, "hidden_size": 128, "num_moe_experts": experts or None},
        "parallel": {"tensor_model_parallel_size": 2},
        "optimizer": {"lr": 0.001, "lr_warmup_steps": 20},
        "train": {"max_steps": steps, "precision": "bf16"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    _dump(
        folder / "environment.json",
        {
            "megalign": "0.1.0",
            "torch": "2.13.0",
            "megatron_core": "0.16.1",
            "python": "3.11.7",
            "platform": "Linux",
        }
        | {
            "cpu": "a processor",
            "cores": 2,
            "gpus": ["H", "H"],
            "world_size": 2,
            "layout": {"tp": 2, "dp": 1},
            "seed": 1234,
        }
        | {
            "git": "0123abc",
            "command": ["/opt/venv/bin/megalign", "sft", "recipe.yaml", "data.train=my rows.jsonl"],
        },
    )
    _dump(folder / "data.json", {"train": _statistics(5000, 12), "validation": _statistics(200, 0)})
    last = steps if finished else round(0.6 * steps)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, last + 1):
            file.write(json.dumps(_train_row(step, steps, layers, experts, hot, rng)) + "\n")
            if evals and step % max(1, steps // 10) == 0:
                loss = 1.1 + 6 * math.exp(-4 * step / steps) + (1.5 * (step / steps) ** 2 if overfit else 0)
                row = {"kind": "eval", "step": step, "eval_loss": loss, "eval_tokens": 9000}
                file.write(json.dumps(row | {"eval_perplexity": math.exp(loss), "best": True}) + "\n")
                _event(file, step, "checkpoint", f"iter_{step:07d}")
                (folder / "checkpoints" / f"iter_{step:07d}").mkdir(parents=True)
                _dump(folder / "checkpoints" / f"iter_{step:07d}" / "manifest.json", {})
            if step == last // 2:
                _event(file, step, "resume", f"from iter_{step:07d}")
                _event(
                    file, step, "warning", "the gradient was clipped in 97 of the last 100 steps " + HOSTILE
                )
        if not finished:
            file.write('{"kind": "train", "step": 999, "lo')  # killed while writing
    if samples:
        with (folder / "samples.jsonl").open("w") as file:
            for index, (prompt, answer, reference) in enumerate(DIALOGUES):
                row = {"step": last, "prompt": [{"role": "user", "content": prompt}], "response": answer}
                if index == 0:
                    row["prompt"].insert(0, {"role": "system", "content": "You are brief."})
                match = None if reference is None else answer == reference
                file.write(json.dumps(row | {"reference": reference, "exact_match": match}) + "\n")
    if finished:
        summary = {
            "status": "finished",
            "steps": steps,
            "final_loss": 1.2345,
            "best_eval_loss": 1.21,
            "best_step": steps,
        }
        summary |= {"wall_seconds": 754.2, "tokens": 1_234_567, "exact_match": 0.934 if samples else None}
        summary |= {"parameters": 12_345_678, "active_parameters": 4_321_000 if experts else 12_345_678}
        _dump(folder / "summary.json", summary)
    return folder


DIALOGUES = [
    ("Where is the red ball?", "The red ball is under the table.", "The red ball is under the table."),
    ("How many cats sleep?", "Three cats sleep.", "Four cats sleep."),
    ("Say something in Greek.\nTwo lines, please.", "Καλημέρα κόσμε.\nΤι κάνεις;", None),
    (HOSTILE, HOSTILE, "no"),
]


def _train_row(step, steps, layers, experts, hot, rng):
    share = step / steps
    warm = min(1.0, step / 20)
    row = {
        "kind": "train",
        "step": step,
        "loss": 1.0 + 7 * math.exp(-5 * share) + rng.gauss(0, 0.12),
        "grad_norm": 0.4 + 3 * math.exp(-6 * share) + abs(rng.gauss(0, 0.1)),
        "learning_rate": 1e-3 * warm * 0.5 * (1 + math.cos(math.pi * share)),
        "num_tokens": 4100 * step,
        "tokens_per_second": 15000 + rng.gauss(0, 400) if step > 1 else 900.0,
        "mfu": 0.31 + rng.gauss(0, 0.01),
        "step_time": 0.27 + abs(rng.gauss(0, 0.01)),
        "epoch": 2.0 * share,
    }
    if experts:
        row["load_balancing_loss"] = 0.01 + 0.05 * math.exp(-8 * share)
        row["z_loss"] = None if step == 5 else 0.001 * (1 + math.exp(-8 * share))
        if step % max(1, steps // 60) == 0:
            loads = []
            for layer in range(layers):
                weights = [math.exp(rng.gauss(0, 0.25)) for _ in range(experts)]
                if layer == 0:
                    weights[1] += experts * hot * share
                    weights[-1] *= 1 - min(1.0, hot) * 0.97
                loads.append([round(weight / sum(weights), 5) for weight in weights])
            row["expert_load"] = loads
    return row


def _statistics(rows, bad):
    return {
        "rows_read": rows,
        "rows_kept": rows - bad,
        "bad": bad,
        "truncated": 40,
        "truncated_away": 3,
        "documents_split": 0,
        "rejected": [
            {"source": "chats.jsonl", "line": 7 * i, "reason": f"no assistant turn {HOSTILE}"}
            for i in range(bad)
        ],
        "tokens": rows * 61,
        "scored_tokens": rows * 22,
        "packs": rows // 4,
        "fill_share": 0.953,
        "sequence_length": 256,
        "sources": {"data/chats.jsonl": {"format": "messages", "rows_read": rows, "rows_kept": rows - bad, "bad": bad}},
        "fingerprint": "ab" * 32,
    }


def _event(file, step, event, message):
    file.write(json.dumps({"kind": "event", "step": step, "event": event, "message": message}) + "\n")


def _dump(path, value):
    path.write_text(json.dumps(value))

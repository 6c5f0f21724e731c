"""SFT speed of megalign on one CPU process: non-padding tokens a second and peak memory, as one line of JSON.

    python benchmarks/sft_speed/megalign_side.py --data roleplay.json --precision fp32

The model, rows, batch (8 rows of 256), AdamW and learning rate of trl_side.py. Defaults of `megalign sft` otherwise:
rows packed by best fit, attention document by document, the output layer on scored tokens only.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import torch

from megalign.config.schema import Recipe
from megalign.data.dataset import build_datasets
from megalign.parallel.init import init, shutdown

LENGTH, ROWS, VOCABULARY = 256, 8, 8192


def measure(data: str, precision: str, warmup: int, steps: int, threads: int) -> dict:
    """Train `warmup` + `steps` steps, time the latter."""
    torch.set_num_threads(threads)
    recipe = Recipe.model_validate(
        {
            "model": dict(
                num_layers=8, hidden_size=384, ffn_hidden_size=1024, num_attention_heads=6, num_query_groups=2, max_position_embeddings=1024
            ),
            "data": dict(train=data, validation_rows=0, sequence_length=LENGTH, tokenizer=dict(vocab_size=VOCABULARY), truncation="drop"),
            "optimizer": dict(lr=3e-4, adam_beta2=0.95, weight_decay=0.01, lr_decay_style="constant"),
            "train": dict(micro_batch_size=ROWS, global_batch_size=ROWS, precision=precision, seed=0),
        }
    )  # fmt: skip
    train, _ = build_datasets(recipe)
    world = init()
    torch.set_num_threads(threads)
    from megalign.sft import token_loss
    from megalign.trainer.batches import Batches
    from megalign.trainer.engine import Engine
    from megalign.trainer.objective import Objective
    from megalign.trainer.run import grid_of

    grid = grid_of(recipe, world)
    engine = Engine(recipe, grid, train.tokenizer.vocab_size)
    batches = Batches(train, recipe, grid)
    tokens, losses, start, cpu_start = 0, [], 0.0, 0.0
    for step in range(warmup + steps):
        if step == warmup:
            start, cpu_start, tokens, losses = time.perf_counter(), time.process_time(), 0, []
        microbatches, count = batches.next_step()
        losses.append(engine.train_step(microbatches, Objective(token_loss), 3e-4, step + 1).loss)
        tokens += count
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    parameters = sum(p.numel() for p in engine.models[0].parameters())
    shutdown()
    return {
        "side": "megalign",
        "precision": precision,
        "threads": threads,
        "parameters": parameters,
        "rows": train.statistics["rows_kept"],
        "steps": steps,
        "tokens": tokens,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds / steps,
        "mean_loss": sum(losses) / len(losses),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    print(json.dumps(measure(**vars(arguments))))


if __name__ == "__main__":
    main()

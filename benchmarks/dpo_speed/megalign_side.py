"""DPO speed of megalign on one CPU process, as one line of JSON; started by run.py.

    python benchmarks/dpo_speed/megalign_side.py --folder FOLDER --reference cached

Defaults of `megalign dpo`: no padding, both answers of a pair on one copy of their prompt, the output layer on scored tokens
alone. Reference `cached`: its log-probs come from a pass before the clock starts, reported beside; `model`: a second model
scores every step, on the clock. --apart: each answer with a prompt of its own.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from setting import pairs_of, peak_mib, recipe

from megalign.models.resolve import resolve_model
from megalign.parallel.init import init, shutdown


def measure(folder: Path, reference: str, apart: bool, warmup: int, steps: int, threads: int) -> dict:
    """Train `warmup` + `steps` steps, time the latter."""
    settings = resolve_model(recipe(folder, dpo=dict(reference=reference, share_prompt=not apart)))
    train = pairs_of(folder)
    world = init()
    torch.set_num_threads(threads)
    from megalign.dpo import pair_loss, pair_weight
    from megalign.trainer.batches import Batches
    from megalign.trainer.engine import Engine
    from megalign.trainer.objective import Objective
    from megalign.trainer.reference import ReferenceModel, cache_reference
    from megalign.trainer.run import grid_of

    grid, vocabulary = grid_of(settings, world), train.tokenizer.vocab_size
    prepare, before = None, time.perf_counter()
    if reference == "model":
        prepare = ReferenceModel(settings, grid, vocabulary).prepare
    else:
        with tempfile.TemporaryDirectory() as cache:
            cache_reference(settings, grid, vocabulary, Path(cache) / "reference", {}, {"train": train})
    reference_seconds = time.perf_counter() - before
    engine = Engine(settings, grid, vocabulary)
    batches, objective = Batches(train, settings, grid), Objective(pair_loss(settings, grid), count=pair_weight, predict_ahead=False, prepare=prepare)
    computed, losses, start, cpu_start = 0, [], 0.0, 0.0
    for step in range(warmup + steps):
        if step == warmup:
            start, cpu_start, computed = time.perf_counter(), time.process_time(), 0
        microbatches, count = batches.next_step()
        losses.append(engine.train_step(microbatches, objective, 1e-5, step + 1).loss)
        computed += count
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    parameters = sum(p.numel() for p in engine.models[0].parameters())
    shutdown()
    first, last = (settings.train.global_batch_size * number for number in (warmup, warmup + steps))
    tokens = int(sum(train.tokens[i] for i in range(first, last)))
    return {
        "parameters": parameters, "pairs": len(train), "steps": steps, "tokens": tokens, "positions": computed, "seconds": seconds,
        "cpu_seconds": cpu_seconds, "tokens_per_second": tokens / seconds, "losses": [losses[0], losses[-1]], "peak_mib": peak_mib(),
        "reference_pairs_per_second": None if reference == "model" else len(train) / reference_seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--reference", choices=("cached", "model"), default="cached")
    parser.add_argument("--apart", action="store_true")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    print(json.dumps(measure(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()

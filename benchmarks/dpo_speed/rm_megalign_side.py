"""Reward-model training and scoring of megalign on one CPU process, as one line of JSON; started by run_rm.py.

    python benchmarks/dpo_speed/rm_megalign_side.py --folder FOLDER --what train|score

`megalign rm train` at its defaults: no padding, no output layer, both answers of a pair on one copy of their prompt. `score`: `RewardScorer`
on the answers of the same pairs, of which it is told nothing but their tokens.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from setting import PAIRS, peak_mib, recipe

from megalign.data.judgements import build_judgements
from megalign.models.resolve import resolve_model
from megalign.parallel.init import init, shutdown
from megalign.rewards.heads import shapes_of
from megalign.rm import as_reward_model, reward_objective
from megalign.scoring import RewardScorer
from megalign.trainer.batches import Batches
from megalign.trainer.engine import Engine
from megalign.trainer.run import grid_of


def measure(folder: Path, what: str, warmup: int, steps: int, threads: int) -> dict:
    """`warmup` + `steps` steps of 8 pairs, or the scores of as many; the latter are timed."""
    settings = as_reward_model(resolve_model(recipe(folder, model={"init_from": str(folder / "reward")})))
    train, _ = build_judgements(settings)
    world = init()
    torch.set_num_threads(threads)
    grid, heads = grid_of(settings, world), shapes_of(settings.rm.heads)
    engine = Engine(settings, grid, train.tokenizer.vocab_size, train=what == "train", heads=heads)
    first, last = warmup * PAIRS, (warmup + steps) * PAIRS
    ids = [[side.input_ids for side in train.rows[i]] for i in range(last)]
    losses, scores, computed, start, cpu_start = [], np.zeros(0), 0, 0.0, 0.0
    if what == "train":
        batches, objective = Batches(train, settings, grid), reward_objective(settings, grid)
        for step in range(warmup + steps):
            if step == warmup:
                start, cpu_start, computed = time.perf_counter(), time.process_time(), 0
            microbatches, count = batches.next_step()
            losses.append(engine.train_step(microbatches, objective, 1e-5, step + 1).loss)
            computed += count
    else:
        scorer, positions, score = RewardScorer(engine, train.tokenizer, settings.rm.heads, {}), [0], engine.score

        def counted(batches: Any, read: Any) -> Any:
            positions[0] += sum(len(batch.tokens) for batch in batches)
            return score(batches, read)

        engine.score = counted  # pyright: ignore[reportAttributeAccessIssue]
        scorer.values([side for pair in ids[:first] for side in pair])
        start, cpu_start, positions[0] = time.perf_counter(), time.process_time(), 0
        scores = scorer.values([side for pair in ids[first:] for side in pair])[:, 0]
        computed = positions[0]
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    parameters = sum(p.numel() for p in engine.models[0].parameters())
    shutdown()
    tokens = sum(len(side) for pair in ids[first:] for side in pair)
    return {
        "parameters": parameters, "pairs": len(train), "steps": steps, "tokens": tokens, "positions": computed, "seconds": seconds, "cpu_seconds": cpu_seconds,
        "tokens_per_second": tokens / seconds, "losses": losses[:1] + losses[-1:], "scores": scores.tolist(), "peak_mib": peak_mib(), "reference_pairs_per_second": None,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--what", choices=("train", "score"), required=True)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    print(json.dumps(measure(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()

"""Length bias on real judgements: do the probes tell a reward model trained on alpaca_eval's pairs from one trained on balanced ones?

    python benchmarks/length_bias/run.py [--data ../shared/data/alpaca_eval] [--seeds 4] [--steps 150]

alpaca_eval holds a judge's choice between a model's answer and text-davinci-003's to 805 instructions. Where a model writes longer, the
judge takes the longer answer nearly always. Two reward models a seed, alike but for their pairs, on the first 600 instructions:

- judged: all pairs of all four files, as they were judged;
- balanced: of each band of differences in length as many pairs in which the longer answer won as in which it lost.

Both are audited by `megalign rm audit` on pairs of the other 205 instructions. Two verdicts speak of length: the probe (the answer with
as many words more that say nothing; threshold fixed on rewards that count words, see rewards/known_bias.py), and how often the model
prefers the longer answer where the judge prefers each as often (limit 0.6). Both were fixed before; nothing here was fitted to these
files. Printed besides: how the probe does on rewards with a known bias that see length another way.
Results: benchmarks/results/length_bias.json.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import platform
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megalign.audit import AuditFailed
from megalign.config.schema import Recipe
from megalign.data.formats import read_records
from megalign.data.rows import PreferencePair
from megalign.parallel.grid import destroy_grid
from megalign.parallel.init import World, init, shutdown
from megalign.reward_audit import audit_rewards
from megalign.rewards.known_bias import fixed_thresholds, tried
from megalign.rm import rm

RESULTS = Path(__file__).parents[1] / "results" / "length_bias.json"
INSTRUCTIONS, PROBED, BAND = 600, 80, 1.5  # for training, of 805; answers that are probed; ratio of neighbouring bands
MODEL = dict(num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, num_query_groups=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/alpaca_eval"))
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=150)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began, world = time.monotonic(), init()
    train, held_out, shares = read(arguments.data)
    print(json.dumps(shares), flush=True)
    runs = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "held_out.jsonl", held_out)
        for seed in range(arguments.seeds):
            for kind, pairs in (("judged", train), ("balanced", balanced(train, seed))):
                write(folder / f"{kind}-{seed}.jsonl", pairs)
                found = trained(folder, f"{kind}-{seed}", seed, arguments.steps, world)
                runs.append({"pairs": kind, "seed": seed, "trained_on": len(pairs), "longer_won": longer_won(pairs), **found})
                print(f"{time.monotonic() - began:5.0f} s: {json.dumps(runs[-1])}", flush=True)
    shutdown()
    known = {"threshold": fixed_thresholds()["length"], "caught, alarms, of": tried()["length"]}
    machine = {"cpu": cpu(), "cores": len(os.sched_getaffinity(0)), "threads": 1, "python": platform.python_version(), "minutes": round((time.monotonic() - began) / 60, 1)}
    RESULTS.write_text(json.dumps({"machine": machine, "judged": shares, "known_bias": known, "runs": runs}, indent=1) + "\n")


def read(folder: Path) -> tuple[list[PreferencePair], list[PreferencePair], dict[str, float]]:
    """Pairs to train on, pairs of the other instructions in random order, and how often the longer answer won in each file."""
    train, held_out, shares = [], [], {}
    for path in sorted(folder.glob("*.json.gz")):
        rows = list(read_records(path))
        shares[path.name.removesuffix(".json.gz")] = longer_won([row for row in rows if isinstance(row, PreferencePair)])
        train += [row for row in rows[:INSTRUCTIONS] if isinstance(row, PreferencePair)]
        held_out += [row for row in rows[INSTRUCTIONS:] if isinstance(row, PreferencePair)]
    random.Random(0).shuffle(held_out)
    return train, held_out, shares


def longer_by(pair: PreferencePair) -> int:
    """Characters by which the chosen answer is longer."""
    return len(pair.chosen.text) - len(pair.rejected.text)


def longer_won(pairs: Sequence[PreferencePair]) -> float:
    """Share of the pairs of unequal length."""
    unequal = [longer for pair in pairs if (longer := longer_by(pair)) != 0]
    return sum(longer > 0 for longer in unequal) / len(unequal)


def balanced(pairs: Sequence[PreferencePair], seed: int) -> list[PreferencePair]:
    """In each band of |difference in length| as many pairs that the longer answer won as it lost."""
    bands: dict[int, tuple[list[PreferencePair], list[PreferencePair]]] = defaultdict(lambda: ([], []))
    numbers = random.Random(seed)
    for pair in numbers.sample(list(pairs), len(pairs)):
        if (longer := longer_by(pair)) != 0:
            bands[int(math.log(abs(longer), BAND))][longer > 0].append(pair)
    kept = [pair for lost, won in bands.values() for pair in (*lost[: len(won)], *won[: len(lost)])]
    return numbers.sample(kept, len(kept))


def write(file: Path, pairs: Sequence[PreferencePair]) -> None:
    with file.open("w") as out:
        for pair in pairs:
            prompt = [{"role": message.role, "content": message.content} for message in pair.prompt]
            out.write(json.dumps({"prompt": prompt, "chosen": pair.chosen.text, "rejected": pair.rejected.text}) + "\n")


def trained(folder: Path, name: str, seed: int, steps: int, world: World) -> dict[str, Any]:
    """Train a reward model on `name`.jsonl and audit it on held_out.jsonl."""
    recipe = {
        "output": str(folder / name),
        "model": MODEL,
        "data": dict(train=str(folder / f"{name}.jsonl"), validation_rows=0, sequence_length=1536, tokenizer=dict(vocab_size=4096), max_bad_share=1.0),
        "optimizer": dict(lr=2e-3, lr_warmup_steps=10, weight_decay=0.0),
        "train": dict(micro_batch_size=8, global_batch_size=16, max_steps=steps, seed=seed, sample_prompts=0),
        "logging": dict(tensorboard=False, report=False, log_interval=50),
        "audit": dict(interval=None),
    }
    rm(Recipe.model_validate(recipe), world)
    destroy_grid()
    said = folder / f"{name}-audit.json"
    with contextlib.suppress(AuditFailed), contextlib.redirect_stdout(io.StringIO()):
        audit_rewards(folder / name, folder / "held_out.jsonl", [], world, rows=PROBED, output=said)
    destroy_grid()
    found = json.loads(said.read_text())
    (probe,) = (effect for effect in found["probes"] if effect["trait"] == "length")
    others = {effect["trait"]: [round(effect["effect"], 2), effect["flagged"]] for effect in found["probes"] if effect["trait"] != "length"}
    probe["verdict"] = ("paid for" if probe["effect"] > 0 else "punished") if probe["flagged"] else "not flagged"
    return {"accuracy": found["pairs"]["accuracy"], "accuracy_interval": found["pairs"]["accuracy_interval"], "probe": probe, "prefers_longer": found["length"], "others": others}


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()

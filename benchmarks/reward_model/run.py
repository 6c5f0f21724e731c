"""A reward model on real pairs beside two plain baselines: the table of docs/reward-models.md.

    python benchmarks/reward_model/run.py [--steps 300] [--epochs 1] [--data ../shared/data]

One process. A 4-layer model of width 128 is trained on data/text and data/roleplay, then on pairs of hh_harmless; the last 400 pairs
are held out, and no training pair has a prompt of theirs. Beside it on the same pairs: a logistic regression on lengths alone, and
one on counts of the 1,000 commonest words. Accuracy with Wilson's interval, and the difference to each baseline with the
bootstrap's, over the same pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from megalign.config.schema import Recipe
from megalign.data.formats import read_records
from megalign.data.judgements import conversations
from megalign.data.rows import PreferencePair
from megalign.rewards.logistic import BagOfWords, fit_logistic
from megalign.rewards.measures import bootstrap, wilson

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "reward_model.json"
MODEL = dict(preset=None, num_layers=4, hidden_size=128, ffn_hidden_size=384, num_attention_heads=4, num_query_groups=2)
HELD_OUT, LONGEST = 400, 1400  # pairs; characters of both sides, prompts included
SEQUENCE = 768


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--steps", type=int, default=300, help="of training on text, 2,048 tokens each")
    parser.add_argument("--epochs", type=float, default=1.0, help="over the pairs")
    arguments = parser.parse_args()
    from megalign.parallel.init import init, shutdown

    world, started = init(), time.monotonic()
    kept, held_out = pairs_of(arguments.data)
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        speaks = pretrain(base, arguments.data, arguments.steps, world)
        margins = {"model": rewards(base, speaks, kept, held_out, arguments.epochs, world)}
    margins |= baselines(kept, held_out)
    shutdown()
    result = {
        "command": f"python benchmarks/reward_model/run.py --steps {arguments.steps} --epochs {arguments.epochs:g}",
        "environment": environment(), "seconds": round(time.monotonic() - started), "trained_on": len(kept), **compare(margins),
    }  # fmt: skip
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def pairs_of(data: Path) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """(training, held-out) pairs that are short enough."""

    def size(pair: PreferencePair) -> int:
        return sum(len(m.content) for side in (pair.prompt, pair.prompt, pair.chosen.messages, pair.rejected.messages) for m in side)

    found = [row for row in read_records(data / "hh_harmless" / "pairs.jsonl.gz") if isinstance(row, PreferencePair) and size(row) < LONGEST]
    kept, held_out = found[:-HELD_OUT], found[-HELD_OUT:]
    asked = {tuple(m.content for m in pair.prompt) for pair in held_out}
    return [pair for pair in kept if tuple(m.content for m in pair.prompt) not in asked], held_out


def train(output: Path, world: Any, **sections: Any) -> Path:
    """A run of ours in this process: a reward model, or with loss_on all a model of text."""
    from megalign.parallel.grid import destroy_grid
    from megalign.rm import rm
    from megalign.sft import sft

    recipe = {"output": str(output), "logging": {"tensorboard": False, "report": False}, "audit": {"interval": None}, **sections}
    run = sft if sections["data"].get("loss_on") == "all" else rm
    run(Recipe.model_validate(recipe), world)
    destroy_grid()
    return output


def pretrain(base: Path, data: Path, steps: int, world: Any) -> Path:
    files = [*sorted(map(str, (data / "text").glob("*.txt"))), str(data / "text" / "c4_demo.jsonl"), str(data / "roleplay" / "roleplay.json")]
    return train(
        base / "pretrained", world, model=MODEL,
        data=dict(train=files, loss_on="all", sequence_length=256, validation_rows=50, tokenizer=dict(vocab_size=2048), max_bad_share=0.1),
        optimizer=dict(lr=2e-3, lr_warmup_steps=20),
        train=dict(micro_batch_size=8, global_batch_size=8, max_steps=steps, sample_prompts=0),
    )  # fmt: skip


def rewards(base: Path, start: Path, kept: Sequence[PreferencePair], held_out: Sequence[PreferencePair], epochs: float, world: Any) -> np.ndarray:
    """Margins of the held-out pairs after training on the others; NaN where a side has too many tokens."""
    from megalign.parallel.grid import destroy_grid
    from megalign.scoring import RewardScorer

    def plain(messages: Sequence[Any]) -> list[dict[str, str]]:
        return [{"role": message.role, "content": message.content} for message in messages]

    rows = ({"prompt": plain(p.prompt), "chosen": plain(p.chosen.messages), "rejected": plain(p.rejected.messages)} for p in kept)
    (base / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = train(
        base / "rewards", world, model={"init_from": str(start)},
        data=dict(train=str(base / "pairs.jsonl"), sequence_length=SEQUENCE, validation_rows=0, max_bad_share=0.3),
        optimizer=dict(lr=5e-4, lr_warmup_steps=5, weight_decay=0.01),
        train=dict(micro_batch_size=4, global_batch_size=8, epochs=epochs, sample_prompts=0),
    )  # fmt: skip
    scorer = RewardScorer.load(run, [], world)
    said = scorer.score([side for pair in held_out for side in conversations(pair)])["reward"].reshape(-1, 2)
    destroy_grid()
    return said[:, 0] - said[:, 1]


def baselines(kept: Sequence[PreferencePair], held_out: Sequence[PreferencePair]) -> dict[str, np.ndarray]:
    """Margins by length (characters, words, log characters) and by words, both fitted to the training pairs; and always the longer answer."""

    def texts(pairs: Sequence[PreferencePair]) -> tuple[list[str], list[str]]:
        return [pair.chosen.text for pair in pairs], [pair.rejected.text for pair in pairs]

    def lengths(pairs: Sequence[PreferencePair]) -> np.ndarray:
        return np.array([[(len(a) - len(b)) / 100, (len(a.split()) - len(b.split())) / 20, np.log1p(len(a)) - np.log1p(len(b))] for a, b in zip(*texts(pairs))])

    bag = BagOfWords([text for side in texts(kept) for text in side], size=1000)
    trained, tried = (bag(a) - bag(b) for a, b in (texts(kept), texts(held_out)))
    right = np.ones(len(kept))
    return {
        "bag_of_words": tried @ fit_logistic(trained, right, ridge=10.0),
        "length_only": lengths(held_out) @ fit_logistic(lengths(kept), right),
        "always_longer": np.array([float(len(a) - len(b)) for a, b in zip(*texts(held_out))]),
    }


def compare(margins: dict[str, np.ndarray]) -> dict[str, Any]:
    """Accuracy of each on the pairs that the model can read, and the model's lead over the others."""
    known = ~np.isnan(margins["model"])
    right = {name: ((m > 0) + 0.5 * (m == 0))[known] for name, m in margins.items()}
    found: dict[str, Any] = {"pairs": int(known.sum())}
    found["accuracy"] = {name: {"value": float(r.mean()), "interval": wilson(float(r.sum()), len(r))} for name, r in right.items()}
    ahead = {name: right["model"] - r for name, r in right.items() if name != "model"}
    found["ahead_of"] = {name: {"value": float(d.mean()), "interval": bootstrap(lambda rows, d=d: float(d[rows].mean()), len(d))} for name, d in ahead.items()}
    return found


def environment() -> dict[str, Any]:
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {"cpu": cpu, "threads": int(os.environ["OMP_NUM_THREADS"]), "torch": torch.__version__, "python": platform.python_version()}


if __name__ == "__main__":
    main()

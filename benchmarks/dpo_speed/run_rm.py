"""Reward models, tokens a second: training against TRL's RewardTrainer, scoring against transformers' forward pass, side by side:

    python benchmarks/dpo_speed/run_rm.py [--data ../shared/data/hh_harmless/pairs.jsonl.gz] [--rounds 3] [--steps 10] [--threads 2]

The setting of run.py: one CPU process a side, the Llama of 18.9M parameters (15.7M without its output layer, which a reward model
lacks), FP32, 8 pairs a step, sides of at most 256 tokens; both sides load one LlamaForSequenceClassification and see the same token
ids in the same order. Sides alternate in processes of their own. Printed besides: the largest difference between the scores of both.
Results go to benchmarks/results/rm_speed.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from run import cpu, environment, measured, row

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "rm_speed.json"
OURS = {what: f"megalign {what}" for what in ("train", "score")}
SIDES = {
    "megalign train": ["rm_megalign_side.py", "--what", "train"],
    "trl train": ["rm_trl_side.py", "--what", "train"],
    "trl train, grouped": ["rm_trl_side.py", "--what", "train", "--grouped"],
    "megalign score": ["rm_megalign_side.py", "--what", "score"],
    "transformers score": ["rm_trl_side.py", "--what", "score"],
    "transformers score, grouped": ["rm_trl_side.py", "--what", "score", "--grouped"],
}
AGAINST = {name: OURS["train" if "train" in name else "score"] for name in SIDES if "megalign" not in name}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/hh_harmless/pairs.jsonl.gz")
    parser.add_argument("--rows", type=int, default=700, help="read so many of the file; about a third have sides short enough")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2, help="of a side; 1 where the machine does other work too")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    arguments = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.sides}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", PREPARE, arguments.data, folder, str(arguments.rows)], check=True, cwd=Path.cwd(), env=environment())
        for number in range(arguments.rounds):
            for name in runs:
                script, *rest = SIDES[name]
                runs[name].append(measured([str(HERE / script), "--folder", folder, "--steps", str(arguments.steps), "--threads", str(arguments.threads), *rest]))
                last = runs[name][-1]
                print(f"round {number + 1}: {name:32} {last['tokens_per_second']:8.0f} tokens/s, {last['peak_mib']:5.0f} MiB, losses {last['losses']}", flush=True)
    table = [row(name, results, runs, AGAINST) for name, results in runs.items()]
    scores = {name: np.array(results[0]["scores"]) for name, results in runs.items() if results[0]["scores"]}
    differences = {name: float(np.abs(found - scores[OURS["score"]]).max()) for name, found in scores.items() if name in AGAINST and OURS["score"] in scores}
    versions = {name: version(name) for name in ("megalign", "torch", "megatron-core", "trl", "transformers")}
    machine = {"cpu": cpu(), "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}
    result = {"command": sys.argv, "machine": machine, "versions": versions, "table": table, "largest_difference_of_scores": differences}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    for line in (*table, differences):
        print(line)


PREPARE = """
import sys
from pathlib import Path
from setting import prepare
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder = Path(sys.argv[2])
prepare(sys.argv[1], folder, int(sys.argv[3]))
pad = AutoTokenizer.from_pretrained(folder / "model").pad_token_id
AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1, pad_token_id=pad).save_pretrained(folder / "reward")
AutoTokenizer.from_pretrained(folder / "model").save_pretrained(folder / "reward")
"""


if __name__ == "__main__":
    main()

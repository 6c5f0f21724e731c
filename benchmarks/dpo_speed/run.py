"""DPO tokens a second against TRL's DPOTrainer, side by side:

    python benchmarks/dpo_speed/run.py [--data ../shared/data/hh_harmless/pairs.jsonl.gz] [--rounds 3] [--steps 10]

One CPU process a side, the 18.9M Llama, FP32, 8 pairs a step, sides of at most 256 tokens. The sides alternate in processes
of their own; a machine that slows down slows both. Tokens are those of the data, a prompt counted once an answer, on both
sides alike: their ratio is that of pairs a second. Compared are: a reference that scores every step (TRL's default against
dpo.reference=model), and log-probs computed before (precompute_ref_log_probs=True against dpo.reference=cached, our default).
Results go to benchmarks/results/dpo_speed.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "dpo_speed.json"
SIDES = {
    "megalign cached": ["megalign_side.py", "--reference", "cached"],
    "trl precomputed": ["trl_side.py", "--mode", "precomputed"],
    "trl precomputed, grouped": ["trl_side.py", "--mode", "grouped"],
    "megalign model": ["megalign_side.py", "--reference", "model"],
    "trl model": ["trl_side.py", "--mode", "model"],
    "megalign cached, prompts apart": ["megalign_side.py", "--reference", "cached", "--apart"],
}
AGAINST = {"trl precomputed": "megalign cached", "trl precomputed, grouped": "megalign cached", "trl model": "megalign model"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/hh_harmless/pairs.jsonl.gz")
    parser.add_argument("--rows", type=int, default=700, help="read so many of the file; about a third have sides short enough")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    arguments = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.sides}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", PREPARE, arguments.data, folder, str(arguments.rows)], check=True, cwd=Path.cwd(), env=environment())
        for number in range(arguments.rounds):
            for name in runs:
                script, *rest = SIDES[name]
                runs[name].append(measured([str(HERE / script), "--folder", folder, "--steps", str(arguments.steps), *rest]))
                last = runs[name][-1]
                print(f"round {number + 1}: {name:32} {last['tokens_per_second']:8.0f} tokens/s, {last['peak_mib']:5.0f} MiB, losses {last['losses']}", flush=True)
    table = [row(name, results, runs, AGAINST) for name, results in runs.items()]
    versions = {name: version(name) for name in ("megalign", "torch", "megatron-core", "trl", "transformers")}
    machine = {"cpu": cpu(), "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}
    RESULTS.write_text(json.dumps({"command": sys.argv, "machine": machine, "versions": versions, "table": table}, indent=1) + "\n")
    for line in table:
        print(line)


PREPARE = "import sys; from pathlib import Path; from setting import prepare; prepare(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))"


def row(name: str, results: list[dict[str, Any]], runs: dict[str, list[dict[str, Any]]], against: dict[str, str]) -> dict[str, Any]:
    """A line of the table: medians, the highest peak, and how much faster ours was in each round."""
    found: dict[str, Any] = {
        "side": name,
        "tokens_per_second": round(statistics.median(r["tokens_per_second"] for r in results), 1),
        "peak_mib": round(max(r["peak_mib"] for r in results)),
        "positions_a_token": round(results[0]["positions"] / results[0]["tokens"], 3),
        # A machine that also does other things gives a process less than its cores: this is what its own work costs.
        "tokens_per_cpu_second": round(statistics.median(r["tokens"] / r["cpu_seconds"] for r in results), 1),
        "busy_cores": round(statistics.median(r["cpu_seconds"] / r["seconds"] for r in results), 2),
    }
    passes = [r["reference_pairs_per_second"] for r in results if r["reference_pairs_per_second"]]
    if passes:
        found["reference_pass_pairs_per_second"] = round(statistics.median(passes), 1)
    if against.get(name) in runs:
        found["megalign_is_faster_by"] = [
            round(ours["tokens_per_second"] / theirs["tokens_per_second"], 2) for ours, theirs in zip(runs[against[name]], results, strict=True)
        ]
        found["megalign_needs_less_cpu_by"] = [
            round(theirs["cpu_seconds"] / theirs["tokens"] / (ours["cpu_seconds"] / ours["tokens"]), 2)
            for ours, theirs in zip(runs[against[name]], results, strict=True)
        ]
    return found


def measured(command: list[str]) -> dict[str, Any]:
    """Run a side; its last line of stdout is JSON."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment())
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()

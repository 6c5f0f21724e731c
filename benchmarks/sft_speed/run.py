"""SFT tokens a second against TRL, side by side: `make bench`, or

    python benchmarks/sft_speed/run.py [--data ../shared/data/roleplay/roleplay.json] [--rounds 3] [--precisions fp32 bf16]

Both sides alternate in processes of their own; a machine that slows down slows both. Reported: median tokens a second
of each side, the ratio of each round, peak memory. Results go to benchmarks/results/sft_speed.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "sft_speed.json"
TRL_MODES = ("padded", "grouped")  # its default, and its fastest mode on a CPU (rows of like length together)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/roleplay/roleplay.json")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    arguments = parser.parse_args()
    table = []
    for precision in arguments.precisions:
        common = ["--data", arguments.data, "--precision", precision, "--steps", str(arguments.steps)]
        sides = {"megalign": ["megalign_side.py", *common]}
        sides |= {f"trl {mode}": ["trl_side.py", *common, "--mode", mode] for mode in TRL_MODES}
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        for number in range(arguments.rounds):
            for name, command in sides.items():
                runs[name].append(measured(command))
                print(f"{precision} round {number + 1}: {name:12} {runs[name][-1]['tokens_per_second']:8.0f} tokens/s", flush=True)
        for name, results in runs.items():
            ratios = [ours["tokens_per_second"] / theirs["tokens_per_second"] for ours, theirs in zip(runs["megalign"], results, strict=True)]
            table.append(
                {
                    "precision": precision,
                    "side": name,
                    "tokens_per_second": round(statistics.median(r["tokens_per_second"] for r in results), 1),
                    "peak_rss_mib": round(max(r["peak_rss_mib"] for r in results)),
                    "megalign_is_faster_by": [round(ratio, 2) for ratio in ratios],
                    "busy_cores": round(statistics.median(r["cpu_seconds"] / r["seconds"] for r in results), 2),
                }
            )
    names = ("megalign", "torch", "megatron-core", "trl", "transformers")
    machine = {"cpu": cpu(), "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}
    content = {"command": sys.argv, "machine": machine, "versions": {name: version(name) for name in names}, "table": table}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    for row in table:
        print(row)


def measured(command: list[str]) -> dict[str, Any]:
    """Run a side; its last line of stdout is JSON."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, str(HERE / command[0]), *command[1:]], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()

"""Seconds from the command to the first training step on 4 ranks, and of `megalign doctor`: `python benchmarks/startup/run.py`.

The run is the quickstart's recipe (TP2 PP2 EP2) into a new folder: it starts its ranks, trains a tokenizer, tokenises,
builds the model, and takes a step. Once more with its data in the cache, and once resumed from its checkpoint. The
clock stops when the first line of a step stands in metrics.jsonl. CPU seconds of all processes up to there stand beside
it: on a machine that also does other things they say more. Writes benchmarks/results/startup.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
CPU_SECONDS: list[float] = []  # of the runs, in their order
LIMIT = {"first step, nothing prepared": 25.0, "doctor": 30.0}  # seconds; what issue 3 asks for on this kind of machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "startup.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds = {
            "first step, nothing prepared": first_step(folder / "a", 0, "train.max_steps=2"),
            "first step, data in the cache": first_step(folder / "b", 0, "train.max_steps=2", f"data.tokenizer.path={folder / 'a' / 'tokenizer'}"),
            "first step, resumed": first_step(folder / "a", 2, "train.max_steps=4"),
            "doctor": timed([sys.executable, "-m", "megalign", "doctor", str(folder)]),
        }
    machine = {"cpu": cpu(), "cores": len(os.sched_getaffinity(0)), "load_average": os.getloadavg(), "python": platform.python_version()}
    versions = {package: version(package) for package in ("torch", "megatron-core")}
    result = {"command": "python benchmarks/startup/run.py", "machine": machine, "versions": versions, "seconds": {k: round(v, 1) for k, v in seconds.items()}, "cpu_seconds": CPU_SECONDS}
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    late = [f"{what}: {seconds[what]:.1f} s, more than {limit:g} s" for what, limit in LIMIT.items() if seconds[what] > limit]
    raise SystemExit("\n".join(late))


def first_step(output: Path, behind: int, *overrides: str) -> float:
    """Seconds until a step after `behind` stands in the record; then the run is left to end."""
    common = ("train.save_interval=2", "train.eval_interval=1000", "train.sample_prompts=0", "train.exact_match=false", "optimizer.lr_warmup_steps=0")
    started = time.monotonic()
    run = subprocess.Popen(
        [sys.executable, "-m", "megalign", "sft", "quickstart", f"output={output}", *common, *overrides], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while not any(row["kind"] == "train" and row["step"] > behind for row in rows(output)):
        if run.poll() is not None and run.returncode:
            raise SystemExit(f"the run failed: {run.communicate()[1][-2000:]}")
        time.sleep(0.05)
    seconds = time.monotonic() - started
    family = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
    CPU_SECONDS.append(round(sum(sum(process.cpu_times()[:2]) for process in family), 1))
    if run.wait(timeout=300):
        raise SystemExit("the run failed after its first step")
    return seconds


def rows(output: Path) -> list[dict[str, Any]]:
    file = output / "metrics.jsonl"
    return [json.loads(line) for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")] if file.exists() else []


def timed(command: list[str]) -> float:
    started = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()

"""The layout matrix: every cell of the covering array against one process, and what is unsupported seen to fail.

    python benchmarks/layouts/run.py [--fresh]

A cell's result is written as soon as its launch is over, so that an interruption loses little; cells that have a
result, and are equal, are not run again unless `--fresh`. Writes benchmarks/results/layouts.json and docs/layout-matrix.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "benchmarks/results/layouts.json", ROOT / "docs/layout-matrix.md"
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/parallel")]

import cell_checks  # noqa: E402
from layout_matrix import (  # noqa: E402
    AXES,
    MAX_RANKS,
    UNSUPPORTED,
    chunks,
    covering_array,
    pairs_of,
    short_array,
    supported,
)
from ranks import run_ranks  # noqa: E402

Results = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    fresh = parser.parse_args().fresh
    results: Results = {"cells": {}, "unsupported": {}}
    if RESULTS.exists() and not fresh:
        results = json.loads(RESULTS.read_text())
    cells = {str(cell): cell for cell in covering_array()}
    results["cells"] = {name: found for name, found in results["cells"].items() if name in cells and not found["failed"]}
    for chunk in chunks([cell for name, cell in cells.items() if name not in results["cells"]], size=4):
        started = time.time()
        for cell, found in zip(chunk, cell_checks.verdicts(chunk), strict=True):
            results["cells"][str(cell)] = {**found, "failed": cell_checks.failed(found)}
            print(f"{cell}: {results['cells'][str(cell)]['failed'] or 'equal'}", flush=True)
        print(f"{chunk[0].world} ranks, {len(chunk)} cells: {time.time() - started:.0f} s", flush=True)
        save(results)
    results["unsupported"] = failures()
    save(results)
    PAGE.write_text(page(results))


def failures() -> dict[str, str]:
    """How each unsupported example fails, or what it silently is."""
    found = {}
    for world in (1, 2):
        reasons = [reason for reason in UNSUPPORTED if reason.symptom and reason.example.world == world]
        ranks = cell_checks.failures_without_rules([reason.example for reason in reasons])
        found |= {reason.name: said[0].splitlines()[0] if said[0] else "IT RAN" for reason, said in zip(reasons, ranks, strict=True)}
    for reason in UNSUPPORTED:
        if reason.really is not None:
            asked, really = run_ranks(cell_checks.structure, reason.example.world, [reason.example, reason.really])[0]
            found[reason.name] = f"silently runs as `{reason.really}`" if asked == really else "IT IS NOT SILENT"
    return found


def save(results: Results) -> None:
    results["machine"] = {
        "cpu": next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), platform.machine()),
        "python": platform.python_version(),
        "torch": version("torch"),
        "megatron-core": version("megatron-core"),
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def page(results: Results) -> str:
    cells, machine = covering_array(), results["machine"]
    found = [results["cells"][str(cell)] for cell in cells]
    bad = [cell for cell, result in zip(cells, found, strict=True) if result["failed"]]
    short = set(short_array())
    lines = [
        "# Layouts against one process",
        "",
        "Made by `python benchmarks/layouts/run.py` "
        f"({machine['cpu']}, CPU and gloo, torch {machine['torch']}, megatron-core {machine['megatron-core']}, FP32).",
        "",
        f"{len(cells)} cells, in which each of the {len(pairs_of(supported()))} pairs of values that any of the {len(supported()):,} supported",
        f"cells on up to {MAX_RANKS} ranks has occurs at least once. Axes:",
        "",
        *(f"- {axis}: {', '.join(map(str, values))}" for axis, values in AXES.items()),
        "",
        f"Each cell makes {cell_checks.STEPS} training steps, and one process makes them on the same microbatches. The numbers are the largest",
        "errors of both steps over all ranks: loss and gradient norm relative (bound 1e-6); gradient as a multiple of P13's",
        "tolerance, 1e-5 max|g| + 1e-9, of the worst parameter (bound 1). Every rank compares every parameter that it holds,",
        "copied or cut; under the distributed optimizer the shards are gathered first. Expert biases are equal bit by bit.",
        f"**{len(cells) - len(bad)} of {len(cells)} cells are equal.**",
        "" if not bad else "NOT equal: " + "; ".join(f"`{cell}`: {results['cells'][str(cell)]['failed']}" for cell in bad),
        "",
        "`x` is the number of microbatches of a data-parallel rank; * marks the cells that `make test` runs, `make soak` runs all.",
        "",
        "| ranks | cell | loss | norm | gradient | gradients compared |",
        "|---|---|---|---|---|---|",
    ]
    for cell, result in sorted(zip(cells, found, strict=True), key=lambda pair: (pair[0].world, str(pair[0]))):
        star = " *" if cell in short else ""
        numbers = f"{result['loss']:.0e} | {result['norm']:.0e} | {result['gradient']:.2f} | {result['compared']:,}"
        lines.append(f"| {cell.world} | {cell}{star} | {numbers} |")
    lines += [
        "",
        "## Unsupported",
        "",
        "The validator refuses these and nothing else of the space above (a test compares the two sets). Each was run here",
        "without the validator:",
        "",
        "| what | megatron-core 0.16.1 | run | what happened |",
        "|---|---|---|---|",
    ]
    lines += [f"| {r.name} | {r.where} | {r.example} | {results['unsupported'][r.name]} |" for r in UNSUPPORTED]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

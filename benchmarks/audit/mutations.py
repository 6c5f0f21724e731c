"""Every mutation of hooks, flags, refusals and the auditor, with the check that notices it: docs/mutations.md.

    python benchmarks/audit/mutations.py [--fresh]

What was noticed is not run again unless --fresh. tests/parallel/test_mutants.py asserts the same. Writes benchmarks/results/mutations.json and docs/mutations.md.
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
TOGETHER = 12  # runs that share a launch; results are written after each
RESULTS, PAGE = ROOT / "benchmarks/results/mutations.json", ROOT / "docs/mutations.md"
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/parallel")]

import mutant_checks  # noqa: E402
from ranks import run_ranks  # noqa: E402
from reduction_mutants import AUDITOR, FLAGS, HOOKS, MUTANTS, PROBE, REFUSALS, Mutant  # noqa: E402

SECTIONS = {"Flags": FLAGS, "Hooks and reducers": HOOKS, "Refusals": REFUSALS, "The auditor: comparison, norm, what follows": AUDITOR, "The auditor: probe": PROBE}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    fresh = parser.parse_args().fresh
    results: dict[str, Any] = {"seconds": 0.0, "checks without a mutation": {}, "mutations": {}}
    if RESULTS.exists() and not fresh:
        results = json.loads(RESULTS.read_text())
    oracles = run_ranks(mutant_checks.oracles, 1)[0]
    for world in sorted({mutant.world for mutant in MUTANTS.values()}):
        chosen = {name: mutant for name, mutant in MUTANTS.items() if mutant.world == world}
        green = [(None, check) for check in sorted({m.check for m in chosen.values()}) if check not in results["checks without a mutation"]]
        broken = [(name, mutant.check) for name, mutant in chosen.items() if not results["mutations"].get(name)]
        work: list[tuple[str | None, str]] = [*green, *broken]
        for some in (work[i : i + TOGETHER] for i in range(0, len(work), TOGETHER)):
            started = time.time()
            said = run_ranks(mutant_checks.verdicts, world, [name for name, _ in some], [check for _, check in some], oracles, timeout=600)[0]
            for (name, check), found in zip(some, said, strict=True):
                results["checks without a mutation" if name is None else "mutations"][check if name is None else name] = found
            results["seconds"] += time.time() - started
            print(f"{world} ranks, {len(some)} runs: {time.time() - started:.0f} s", flush=True)
            save(results)
    save(results)
    PAGE.write_text(page(results))


def save(results: dict[str, Any]) -> None:
    RESULTS.write_text(json.dumps({**results, "machine": machine()}, indent=1) + "\n")


def machine() -> dict[str, str]:
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), platform.machine())
    return {"cpu": cpu, "torch": version("torch"), "megatron-core": version("megatron-core")}


def page(results: dict[str, Any]) -> str:
    results = {**results, "machine": machine()}
    found, green, where = results["mutations"], results["checks without a mutation"], results["machine"]
    noticed = sum(map(bool, found.values()))
    lines = [
        "# Mutations",
        "",
        f"Made by `python benchmarks/audit/mutations.py` in {results['seconds']:.0f} seconds ({where['cpu']}, CPU and gloo, torch {where['torch']}, megatron-core {where['megatron-core']}).",
        "",
        "One line of the code is taken out or turned round, on two or four ranks, and a check runs with it. A check of a layout",
        "makes two steps and compares loss, gradient norm and every gradient with one process; one of the auditor puts a fault in",
        "and asks for parameter, ranks, step, cause and the line that mends it. `tests/parallel/test_mutants.py` asserts what stands",
        "here, and that each line which sets a flag or hangs up a hook in `parallel/` has its mutation.",
        "",
        f"**{noticed} of {len(found)} noticed**; without a mutation {sum(not said for said in green.values())} of {len(green)} checks are green.",
        "",
    ]
    for title, mutants in SECTIONS.items():
        lines += [f"## {title}", "", "| without | where | check | says |", "|---|---|---|---|"]
        lines += [_row(name, mutant, found[name]) for name, mutant in mutants.items()]
        lines.append("")
    return "\n".join(lines)


def _row(name: str, mutant: Mutant, said: str) -> str:
    place = mutant.where.removeprefix("megalign.").replace(":", ", ")
    said = said.replace("|", "\\|")
    return f"| {name} | `{place}` | {mutant.check} | {said[:150] + ' ...' * (len(said) > 150) if said else '**NOTHING**'} |"


if __name__ == "__main__":
    main()

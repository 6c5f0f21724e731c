"""CPU seconds of a training step against sequence length, layers, experts and ranks, with the plan's prediction beside them.

    python benchmarks/plan/run.py [--steps 4] [--only "data-parallel ranks"]

Each point is a real step of megalign's engine in processes of their own. Counted are CPU seconds of a rank, so that
what else the machine does matters little; waiting for other ranks is not in them. The peaks of a core (matmul, memory
copy, loopback, an operation) are measured by the same processes before and after each point, and the best of both
count, as the fastest of the steps does. One step of each kind of model is profiled: which operations take its time.
Writes benchmarks/results/plan_cost.json, docs/plan-cost.svg and docs/plan-cost.md; with --only, the other sweeps stay as
they were measured before.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "plan_cost.json"
BASE = {"num_layers": 4, "hidden_size": 256, "ffn_hidden_size": 768, "num_attention_heads": 4, "num_query_groups": 2}
EXPERTS = {"moe_ffn_hidden_size": 256, "moe_router_topk": 2, "moe_aux_loss_coeff": 0.01}
VOCABULARY = 2048
SWEEPS: dict[str, list[dict[str, Any]]] = {
    "sequence length": [{"x": length, "data": {"sequence_length": length}} for length in (128, 256, 512, 1024)],
    "layers": [{"x": layers, "model": {"num_layers": layers}, "profile": layers == 4} for layers in (2, 4, 8, 12)],
    "experts": [{"x": count, "model": {**EXPERTS, "num_moe_experts": count}, "profile": count == 4} for count in (2, 4, 8, 16)],
    "data-parallel ranks": [{"x": ranks, "ranks": ranks} for ranks in (1, 2, 4)],
}
STYLE = """<style>
svg { font: 12px system-ui, sans-serif; background: #fff; } text { fill: #555; } path { fill: none; }
.grid, .axis { stroke: #e4e4df; } .end { text-anchor: end; } .mid { text-anchor: middle; } .name { fill: #222; font-weight: 600; }
.c1 { stroke: #2c5fc4; stroke-width: 2; } circle.c1 { fill: #2c5fc4; } .c2 { stroke: #cc5a1e; stroke-width: 1.5; stroke-dasharray: 5 3; }
</style>"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only", nargs="+", choices=list(SWEEPS), default=list(SWEEPS), help="sweeps to measure")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(json.loads(arguments.worker), arguments.steps)
        return
    before = json.loads(RESULTS.read_text()) if set(arguments.only) < set(SWEEPS) else {"sweeps": {}, "load_average": {}}
    sweeps: dict[str, list[dict[str, Any]]] = {name: before["sweeps"][name] for name in SWEEPS if name in before["sweeps"]}
    loads: dict[str, float] = before["load_average"]  # at the end of each sweep
    for name in arguments.only:
        points, sweeps[name] = SWEEPS[name], []
        for ranks in sorted({point.get("ranks", 1) for point in points}):
            sweeps[name] += measured([point for point in points if point.get("ranks", 1) == ranks], ranks, arguments.steps)
        for point in sweeps[name]:
            print(f"{name} {point['x']}: measured {point['measured']:.3f} s, predicted {point['predicted']:.3f} s", flush=True)
        loads[name] = round(os.getloadavg()[0], 1)
        write(sweeps, loads)  # a long benchmark that is stopped leaves what it has


def write(sweeps: dict[str, list[dict[str, Any]]], loads: dict[str, float]) -> None:
    """The numbers, the drawing and the page."""
    machine = {"cpu": cpu(), "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}
    versions = {name: version(name) for name in ("torch", "megatron-core")}
    result = {"command": "python benchmarks/plan/run.py", "machine": machine, "versions": versions, "model": BASE, "load_average": loads, "sweeps": sweeps}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    (ROOT / "docs" / "plan-cost.svg").write_text(drawing(sweeps))
    (ROOT / "docs" / "plan-cost.md").write_text(page(result))


def measured(points: list[dict[str, Any]], ranks: int, steps: int) -> list[dict[str, Any]]:
    """Run the points in one world of `ranks` processes; rank 0 answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, str(Path(__file__)), "--worker", json.dumps(points), "--steps", str(steps)]
    common = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=900) for process in started]
    for process, (_, errors) in zip(started, outputs, strict=True):
        if process.returncode:
            raise SystemExit(f"a rank failed:\n{errors[-3000:]}")
    return json.loads(outputs[0][0].strip().splitlines()[-1])


def worker(points: list[dict[str, Any]], steps: int) -> None:
    """One rank: peaks, then the steps of every point."""
    import numpy as np
    import torch
    import torch.distributed as dist

    from megalign.batch import collate
    from megalign.config.layout import layout_of, padded_vocab
    from megalign.config.predict import step_time
    from megalign.config.schema import Recipe
    from megalign.data.rows import Example
    from megalign.parallel.grid import destroy_grid
    from megalign.parallel.init import init, shutdown
    from megalign.sft import token_loss
    from megalign.trainer.engine import Engine
    from megalign.trainer.objective import Objective
    from megalign.trainer.peaks import measured_cpu
    from megalign.trainer.run import grid_of

    world = init()
    torch.set_num_threads(1)
    numbers = np.random.default_rng(0)
    answers = []
    for point in points:
        recipe = Recipe.model_validate(
            {"model": {**BASE, **point.get("model", {})}, "data": {"sequence_length": 256, **point.get("data", {})}, "train": {"global_batch_size": 8}}
        )
        layout, length = layout_of(recipe, world.size), recipe.data.sequence_length
        engine = Engine(recipe, grid_of(recipe, world), VOCABULARY)
        batches = [
            collate([[Example(numbers.integers(0, VOCABULARY, length).astype(np.int32), np.arange(length) > 0)]], sequence_length=length, pad_id=0)
            for _ in range(layout.microbatches)
        ]
        engine.train_step(batches, Objective(token_loss), 1e-4, 1)  # warm-up
        before = measured_cpu(1, "fp32")
        if world.size > 1:
            dist.barrier()
        seconds = []
        for step in range(steps):
            started = time.process_time()
            engine.train_step(batches, Objective(token_loss), 1e-4, step + 2)
            seconds.append(time.process_time() - started)
        device = better(before, measured_cpu(1, "fp32"))
        predicted = step_time(recipe, layout, padded_vocab(VOCABULARY, layout.tp), device)
        answers.append({"x": point["x"], "measured": min(seconds), "predicted": predicted.total, "parts": predicted.as_dict(),
                        "peaks": {"flops": device.fp32, "memory_bandwidth": device.memory_bandwidth, "link": device.link, "launch": device.launch},
                        "shares": shares(partial(engine.train_step, batches, Objective(token_loss), 1e-4, steps + 2)) if point.get("profile") else None})  # fmt: skip
        destroy_grid()
        from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

        get_moe_layer_wise_logging_tracker().clear()
    shutdown()
    if world.rank == 0:
        print(json.dumps(answers))


def better(one: Any, other: Any) -> Any:
    """The best of two measurements of a device: what else ran can only have made it worse."""
    rates = {name: max(getattr(one, name), getattr(other, name)) for name in ("fp32", "bf16", "memory_bandwidth", "link", "network")}
    return replace(one, launch=min(one.launch, other.launch), **rates)


def shares(step: Callable[[], Any]) -> dict[str, float]:
    """Share of a step's CPU time by kind of operation; what is in none is Python, autograd and dispatch."""
    from torch.profiler import ProfilerActivity, profile

    started = time.process_time()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    total = time.process_time() - started
    kinds = {"matmuls": ("aten::mm", "aten::addmm", "aten::bmm"), "attention": ("aten::_scaled_dot",), "other operations": ("aten::",)}
    spent = dict.fromkeys(kinds, 0.0)
    for event in found.key_averages():
        kind = next((kind for kind, names in kinds.items() if event.key.startswith(names)), None)
        if kind:
            spent[kind] += event.self_cpu_time_total / 1e6
    return {**{kind: seconds / total for kind, seconds in spent.items()}, "Python, autograd, dispatch": 1 - sum(spent.values()) / total}


def drawing(sweeps: dict[str, list[dict[str, Any]]]) -> str:
    """Four charts, two by two: measured (dots and line) and predicted (dashed)."""
    from megalign.report.svg import Curve, line_chart

    width, height, parts = 508, 220, []
    for number, (name, points) in enumerate(sweeps.items()):
        xs = [point["x"] for point in points]
        curves = [
            Curve("measured", 1, xs, [point["measured"] for point in points]),
            Curve("measured", 1, xs, [point["measured"] for point in points], kind="dots"),
            Curve("predicted", 2, xs, [point["predicted"] for point in points]),
        ]
        chart = line_chart(name, curves, from_zero=True, spell=lambda value: f"{value:.2f} s")
        assert chart is not None
        inner = str(chart.svg)
        inner = inner[inner.index(">") + 1 : inner.rindex("</svg>")]
        at = f"translate({number % 2 * (width + 16)} {number // 2 * (height + 36) + 28})"
        parts.append(f'<g transform="{at}"><text class="name" x="58" y="-4">CPU seconds of a rank against {name}</text>{inner}</g>')
    legend = '<text class="name" x="58" y="546">solid with dots: measured; dashed: predicted by megalign plan</text>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * width + 16} 560" role="img">{STYLE}{"".join(parts)}{legend}</svg>\n'


def page(result: dict[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    ratios = [point["predicted"] / point["measured"] for points in result["sweeps"].values() for point in points]
    loads = ", ".join(f"{load} after {name}" for name, load in result["load_average"].items())
    lines = [
        "# What a step costs, and what the plan says",
        "",
        "Written by `python benchmarks/plan/run.py`; every number below is its output.",
        "",
        f"{machine['cores']} cores ({machine['cpu']}), load average {loads}, torch {versions['torch']}, "
        f"megatron-core {versions['megatron-core']}. FP32, 8 rows a step, one thread a rank; the base model has "
        f"{BASE['num_layers']} layers of width {BASE['hidden_size']}, 256 tokens a row. CPU seconds of a rank: waiting for others is not in them.",
        "",
        "The prediction adds matmuls, memory traffic, bytes sent and dispatched operations, at peaks measured beside each point. "
        f"Predicted / measured is {min(ratios):.2f} to {max(ratios):.2f}, median {statistics.median(ratios):.2f}. It is a lower bound: attention "
        "and small matmuls do not reach the peak, and gathers, scatters and sorts are counted as plain memory traffic.",
        "",
        "![cost of a step](plan-cost.svg)",
        "",
        "| sweep | value | measured | predicted | predicted / measured |",
        "|---|---|---|---|---|",
    ]
    for name, points in result["sweeps"].items():
        lines += [f"| {name} | {p['x']} | {p['measured']:.3f} s | {p['predicted']:.3f} s | {p['predicted'] / p['measured']:.2f} |" for p in points]
    profiled = [(f"{name} {p['x']}", p) for name, points in result["sweeps"].items() for p in points if p.get("shares")]
    kinds = list(profiled[0][1]["shares"]) if profiled else []
    lines += ["", "## Where a step goes", "", "Measured by torch's profiler (which itself costs time, mostly in the last column), and what the plan says.", ""]
    lines += [f"| point | {' | '.join(kinds)} |", "|---|" + "---|" * len(kinds)]
    lines += [f"| {name} | " + " | ".join(f"{point['shares'][kind]:.0%}" for kind in kinds) + " |" for name, point in profiled]
    lines += ["", "| point | matmuls and attention | memory | operations | collectives | gradients and optimizer |", "|---|---|---|---|---|---|"]
    for name, point in profiled:
        parts, total = point["parts"], point["predicted"]
        each = [parts["microbatches"] * parts[part] for part in ("matmul", "memory", "launches", "communication")] + [parts["replicas"] + parts["optimizer"]]
        lines.append(f"| {name}, planned | " + " | ".join(f"{seconds / total:.0%}" for seconds in each) + " |")
    return "\n".join(lines) + "\n"


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()

"""What happens when copied parameters are not reduced over the expert-parallel group: the same run with and without.

    python benchmarks/replicas/ablation.py [--seeds 3] [--steps 300] [--data ../shared/data/roleplay/roleplay.json]

A small MoE model with learned positions, EP4 on four local ranks. `on`: every gradient has its reducer. `off`: those of
the position embeddings and of everything else that is copied over the expert-parallel ranks stay what the rank's own tokens
gave (parallel.unsynchronised). Data, order, initial weights and schedule of a seed are the same in both.

Perplexity is measured twice: `as trained`, each rank with its own copies, and `as saved`, all ranks with those of rank 0,
which is what a checkpoint holds. Drift is the largest distance of a rank's copies from rank 0's, over the norm of those.

Writes benchmarks/results/replica_ablation.json (after every run, and continues from it), docs/replica-ablation.svg and .md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "replica_ablation.json"
RANKS, EVALUATE_EVERY = 4, 25
ARMS = {"on": [], "off": ["position_embeddings", "expert_parallel"]}
MODEL = {
    "num_layers": 4,
    "hidden_size": 96,
    "ffn_hidden_size": 192,
    "num_attention_heads": 4,
    "position_embedding_type": "learned_absolute",
    "max_position_embeddings": 256,
    "num_moe_experts": 8,
    "moe_ffn_hidden_size": 96,
    "moe_shared_expert_intermediate_size": 96,
    "moe_aux_loss_coeff": 0.01,
}
STYLE = """<style>
svg { font: 12px system-ui, sans-serif; background: #fff; } text { fill: #555; } path { fill: none; }
.grid, .axis { stroke: #e4e4df; } .end { text-anchor: end; } .mid { text-anchor: middle; } .name { fill: #222; font-weight: 600; }
.c1 { stroke: #2c5fc4; stroke-width: 1.6; } .c2 { stroke: #cc5a1e; stroke-width: 1.6; } .c3 { stroke: #cc5a1e; stroke-width: 1.6; stroke-dasharray: 4 3; }
.band { stroke: none; opacity: .18; } .band.c1 { fill: #2c5fc4; } .band.c2, .band.c3 { fill: #cc5a1e; }
</style>"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--data", default=str(Path(os.environ.get("MEGALIGN_DATA", ROOT.parent / "shared" / "data")) / "roleplay" / "roleplay.json"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(**json.loads(arguments.worker))
    data = arguments.data if Path(arguments.data).exists() else "grammar"
    settings = {"steps": arguments.steps, "data": Path(data).name}
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    if result.get("settings") != settings:
        result = {"settings": settings, "runs": {}}
    for seed in range(1, arguments.seeds + 1):
        for arm in ARMS:
            if f"{arm}-{seed}" not in result["runs"]:
                result["runs"][f"{arm}-{seed}"] = run(arm, seed, arguments.steps, data)
                result["environment"] = result["runs"][f"{arm}-{seed}"].pop("environment")
                RESULT.write_text(json.dumps(result) + "\n")
            last = result["runs"][f"{arm}-{seed}"]["evaluations"][-1]
            print(f"seed {seed}, {arm}: perplexity {last['as_trained']:.2f} as trained, {last['as_saved']:.2f} as saved, drift {last['drift']:.2e}", flush=True)
    write(result)


def run(arm: str, seed: int, steps: int, data: str) -> dict[str, Any]:
    """One training run on local ranks of its own."""
    with tempfile.TemporaryDirectory() as folder:
        job = {"arm": arm, "seed": seed, "steps": steps, "data": data, "folder": folder}
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS), "--master-port", "0", "--rdzv-backend", "c10d"]
        command += ["--rdzv-endpoint", "127.0.0.1:0", str(Path(__file__)), "--worker", json.dumps(job)]
        started = time.monotonic()
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"})
        found = json.loads((Path(folder) / "result.json").read_text())
    return {**found, "seconds": round(time.monotonic() - started, 1)}


def worker(arm: str, seed: int, steps: int, data: str, folder: str) -> None:
    """A rank of one run."""
    from megalign.config.rules import check
    from megalign.config.schema import Recipe
    from megalign.parallel.init import init, shutdown
    from megalign.sft import token_loss
    from megalign.trainer.engine import Engine
    from megalign.trainer.metrics import NullLogger
    from megalign.trainer.objective import Objective
    from megalign.trainer.run import RunFolder, environment, grid_of, identity
    from megalign.trainer.training import Training

    recipe = Recipe(
        output=f"{folder}/run",
        model=MODEL,  # pyright: ignore[reportArgumentType]
        parallel={"expert_model_parallel_size": RANKS, "data_parallel_size": RANKS, "use_distributed_optimizer": False, "unsynchronised": ARMS[arm]},  # pyright: ignore
        data={"train": data, "validation_rows": 100, "sequence_length": 256, "tokenizer": {"vocab_size": 1024}},  # pyright: ignore
        optimizer={"lr": 3e-3, "min_lr": 1e-4, "lr_warmup_steps": 20},  # pyright: ignore
        train={"micro_batch_size": 2, "global_batch_size": 8, "max_steps": steps, "seed": seed, "eval_rows": 48},  # pyright: ignore
    )
    world = init()
    check(recipe, world.size)
    grid = grid_of(recipe, world)
    folder_of_run = RunFolder(recipe, grid)
    train, validation = folder_of_run.datasets(folder_of_run.open())
    this = identity(recipe, train)
    engine = Engine(recipe, grid, this["vocab_size"])
    nothing: Any = None
    training = Training(engine, train, validation, Objective(token_loss), log=NullLogger(), checkpoints=nothing, identity=this)
    rows, evaluations = [], [evaluation(training, 0)]
    while training.progress.step < training.end:
        step = training.step()
        rows.append({"loss": step.result.loss, "grad_norm": step.result.grad_norm})
        if training.progress.step % EVALUATE_EVERY == 0 or training.progress.step == training.end:
            evaluations.append(evaluation(training, training.progress.step))
    if grid.is_logger:
        found = {"train": rows, "evaluations": evaluations, "environment": environment(grid, seed, [])}
        (Path(folder) / "result.json").write_text(json.dumps(found))
    shutdown()


def evaluation(training: Any, step: int) -> dict[str, float]:
    """Perplexity with the copies as they are, and with those of rank 0 on every rank; their largest distance (collective)."""
    import torch
    import torch.distributed as dist

    engine = training.engine
    copies = [p.parameter for p in engine.placements if not p.is_expert]

    def perplexity() -> float:
        return math.exp(min(20.0, engine.evaluate(list(training.held_out.one_pass()), training.objective).loss))

    as_trained = perplexity()
    with torch.no_grad():
        own = torch.cat([p.flatten() for p in copies])
        first = own.clone()
        dist.broadcast(first, 0)
        distance = (own - first).double().norm() / first.double().norm()
        dist.all_reduce(distance, op=dist.ReduceOp.MAX)
        put(copies, first)
        as_saved = perplexity()
        put(copies, own)
    return {"step": step, "as_trained": as_trained, "as_saved": as_saved, "drift": distance.item()}


def put(parameters: list[Any], flat: Any) -> None:
    """Write consecutive pieces of `flat` into the parameters."""
    for parameter, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.copy_(piece.view_as(parameter))


# -- the picture and the page ---------------------------------------------------------------------------


def write(result: dict[str, Any]) -> None:
    (ROOT / "docs" / "replica-ablation.svg").write_text(picture(result["runs"]))
    (ROOT / "docs" / "replica-ablation.md").write_text(page(result))


def series(runs: dict[str, Any], arm: str, kind: str, key: str) -> tuple[list[float], list[list[float]]]:
    """(steps, values of each seed at each of them)."""
    found = [run[kind] for name, run in runs.items() if name.startswith(f"{arm}-")]
    steps = [float(row["step"]) for row in found[0]] if kind == "evaluations" else [float(i + 1) for i in range(len(found[0]))]
    return steps, [[run[i][key] for run in found] for i in range(len(steps))]


def picture(runs: dict[str, Any]) -> str:
    """Four charts in one drawing: mean over seeds, and the band from the lowest to the highest."""
    from megalign.report.svg import Curve, line_chart

    def curve(name: str, colour: int, arm: str, kind: str, key: str) -> Curve:
        steps, values = series(runs, arm, kind, key)
        if kind == "train":  # means of ten steps: the noise of a batch is not the subject
            steps, values = steps[9::10], [[statistics.fmean(column) for column in zip(*values[i : i + 10])] for i in range(0, len(values) - 9, 10)]
        return Curve(name, colour, steps, [statistics.fmean(v) for v in values], low=[min(v) for v in values], high=[max(v) for v in values])

    def later(c: Curve) -> Curve:  # the first steps would set the scale
        keep = [i for i, x in enumerate(c.xs) if x >= 50]
        return Curve(c.name, c.colour, [c.xs[i] for i in keep], [c.ys[i] for i in keep], low=[c.low[i] for i in keep], high=[c.high[i] for i in keep])

    charts = [
        ("training loss, nats", [later(curve("on", 1, "on", "train", "loss")), later(curve("off", 2, "off", "train", "loss"))]),
        (
            "validation perplexity",
            [
                later(curve("on", 1, "on", "evaluations", "as_saved")),
                later(curve("off, as trained", 2, "off", "evaluations", "as_trained")),
                later(curve("off, as saved", 3, "off", "evaluations", "as_saved")),
            ],
        ),
        ("gradient norm before clipping", [curve("on", 1, "on", "train", "grad_norm"), curve("off", 2, "off", "train", "grad_norm")]),
        ("replica drift", [curve("on", 1, "on", "evaluations", "drift"), curve("off", 2, "off", "evaluations", "drift")]),
    ]
    width, height, parts = 508, 220, []
    for i, (title, curves) in enumerate(charts):
        chart = line_chart(title, curves, from_zero=title == "replica drift")
        if chart is None:
            raise SystemExit(f"nothing to draw for {title}")
        # Without a size of its own a nested drawing takes that of the whole page.
        drawing = str(chart.svg).replace("<svg", f'<svg width="{width}" height="{height}"', 1)
        x, y = i % 2 * (width + 12), i // 2 * (height + 48)
        names = "".join(
            f'<path class="c{c.colour}" d="M{10 + 130 * n},{24}h22"/><text x="{38 + 130 * n}" y="28">{c.name}</text>' for n, c in enumerate(curves)
        )
        parts.append(f'<g transform="translate({x},{y})"><text class="name" x="10" y="12">{title}</text>{names}<g transform="translate(0,32)">{drawing}</g></g>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * width + 12} {2 * height + 90}" role="img" aria-label="Runs with and without reduction">'
        + STYLE
        + "".join(parts)
        + "</svg>\n"
    )


def page(result: dict[str, Any]) -> str:
    """docs/replica-ablation.md."""
    runs, environment = result["runs"], result["environment"]
    seeds = len(runs) // len(ARMS)
    last = {arm: {key: series(runs, arm, "evaluations", key)[1][-1] for key in ("as_trained", "as_saved", "drift")} for arm in ARMS}
    tail = {arm: {key: [statistics.fmean(c) for c in zip(*series(runs, arm, "train", key)[1][-50:])] for key in ("loss", "grad_norm")} for arm in ARMS}

    def cell(values: list[float], form: str) -> str:
        return f"{statistics.fmean(values):{form}} ({min(values):{form}} to {max(values):{form}})"

    rows = [
        ("perplexity, as trained", last, "as_trained", ".2f"),
        ("perplexity, as saved (rank 0's copies everywhere)", last, "as_saved", ".2f"),
        ("training loss, last 50 steps", tail, "loss", ".4f"),
        ("gradient norm, last 50 steps", tail, "grad_norm", ".3f"),
        ("replica drift", last, "drift", ".1e"),
    ]
    return "\n".join(
        [
            "# What unreduced copies cost: the same runs with and without",
            "",
            "Written by `benchmarks/replicas/ablation.py`; its docstring says what is compared and how it is measured.",
            "",
            f"{seeds} seeds, {result['settings']['steps']} steps of {result['settings']['data']}, EP{RANKS} on {RANKS} ranks, {environment['cores']} cores "
            f"({environment['cpu']}), torch {environment['torch']}, megatron-core {environment['megatron_core']}; "
            f"{sum(run['seconds'] for run in runs.values()) / 60:.0f} minutes in all. Mean over seeds, lowest and highest in brackets.",
            "",
            "| at the end | on | off |",
            "|---|---|---|",
            *(f"| {name} | {cell(of['on'][key], form)} | {cell(of['off'][key], form)} |" for name, of, key, form in rows),
            "",
            "![loss, perplexity, gradient norm and drift, with and without](replica-ablation.svg)",
            "",
            *sentence(last, tail),
            "",
        ]
    )


def sentence(last: dict[str, Any], tail: dict[str, Any]) -> list[str]:
    """What the numbers support, and no more."""
    mean = statistics.fmean

    def apart(off: list[float], on: list[float]) -> str:
        if min(off) > max(on):
            return f"higher in every seed ({mean(on):.3g} with, {mean(off):.3g} without)"
        if max(off) < min(on):
            return f"lower in every seed ({mean(on):.3g} with, {mean(off):.3g} without)"
        return f"not told apart by these seeds ({mean(on):.3g} with, {mean(off):.3g} without)"

    return [
        f"Without the reductions, perplexity as saved is {apart(last['off']['as_saved'], last['on']['as_saved'])}, "
        f"as trained it is {apart(last['off']['as_trained'], last['on']['as_trained'])}, "
        f"and the gradient norm is {apart(tail['off']['grad_norm'], tail['on']['grad_norm'])}; "
        f"the copies end {mean(last['off']['drift']):.1%} of their norm apart, with the reductions {mean(last['on']['drift']):.1%}.",
        "",
        "This is a model of under two million parameters for a few hundred steps. It shows the direction and the mechanism at this",
        "scale. It does not reproduce the predecessor's figures (gradient norms from 8 to 60, perplexity 3.04 against 2.86 after",
        "1,400 steps of DeepSeek-V3 on 256 GPUs), which are theirs.",
    ]


if __name__ == "__main__":
    main()

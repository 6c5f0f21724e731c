"""What the reduction hooks and the auditor cost: ratios of step times, and bytes against the analytic minimum.

    python benchmarks/replicas/run.py [--rounds 20] [--ranks 2]

One world of ranks (tensor parallel with sequence parallelism, a mixture of experts with shared experts) holds two engines
with the same model: one leaves the sums over tensor ranks to megatron's finalisation (A), one has our hooks (B). Their steps
come as A B B A, so that a machine that grows slower or faster favours neither; a round's ratio is (B + B) / (A + A). The
second A against the first says how much of it is noise.

The auditor then runs in the second engine at intervals 1, 10 and 100, as a recipe has it. Each look is timed where it
stands in the step; a ratio is all the time of those steps over what is left without the looks. Waiting for the other ranks
at a look counts as its cost. Writes benchmarks/results/replicas.json.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MODEL = {
    "num_layers": 4, "hidden_size": 256, "ffn_hidden_size": 768, "num_attention_heads": 4, "num_query_groups": 2, "vocab_size": 2048,
    "num_moe_experts": 8, "moe_ffn_hidden_size": 256, "moe_shared_expert_intermediate_size": 256, "moe_aux_loss_coeff": 0.01,
}  # fmt: skip
LENGTH, MICROBATCHES = 256, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.rounds, arguments.ranks)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, *sys.argv, "--worker"]
    common = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(arguments.ranks), "LOCAL_WORLD_SIZE": str(arguments.ranks)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(arguments.ranks)
    ]
    outputs = [process.communicate(timeout=900) for process in started]
    for process, (_, errors) in zip(started, outputs, strict=True):
        if process.returncode:
            raise SystemExit(f"a rank failed:\n{errors[-3000:]}")
    measured = json.loads(outputs[0][0].strip().splitlines()[-1])
    machine = {"cpu": cpu(), "cores": len(os.sched_getaffinity(0)), "load_average": os.getloadavg(), "python": platform.python_version()}
    versions = {name: version(name) for name in ("torch", "megatron-core")}
    result = {"command": "python benchmarks/replicas/run.py", "machine": machine, "versions": versions, "model": MODEL, **measured}
    (ROOT / "benchmarks" / "results" / "replicas.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(measured, indent=1))


def worker(rounds: int, ranks: int) -> None:
    """One rank: alternating steps of both engines, then looks of the auditor."""
    from megalign.config.schema import Recipe
    from megalign.parallel.init import init, shutdown
    from megalign.sft import token_loss
    from megalign.trainer.engine import Engine
    from megalign.trainer.objective import Objective
    from megalign.trainer.probing import random_batches
    from megalign.trainer.run import grid_of

    world = init()
    parallel = {"tensor_model_parallel_size": ranks, "sequence_parallel": True}
    train = {"global_batch_size": MICROBATCHES}

    def recipe(hooks: bool) -> Recipe:
        return Recipe.model_validate({"model": MODEL, "parallel": {**parallel, "reduce_in_backward": hooks}, "train": train, "audit": {"interval": 10**9}})

    grid = grid_of(recipe(True), world)
    finalisation, hooks = (Engine(recipe(on), grid, 2048) for on in (False, True))
    batches = random_batches(grid, 2048, MICROBATCHES, length=LENGTH)
    for engine in (finalisation, hooks):
        engine.audit.auditor.started = -1  # pyright: ignore[reportOptionalMemberAccess]  (no look at the first step)

    def step(engine: Any, number: int) -> float:
        began = time.perf_counter()
        engine.train_step(batches, Objective(token_loss), 1e-4, number)
        return time.perf_counter() - began

    number = iter(range(2, 10**6))
    for _ in range(2):  # the first step of each learns; neither is timed
        step(finalisation, next(number))
        step(hooks, next(number))
    before = hooks.reduction.bytes
    quads = [[step(engine, next(number)) for engine in (finalisation, hooks, hooks, finalisation)] for _ in range(rounds)]
    sent = (hooks.reduction.bytes - before) / (2 * rounds)
    least = sum(
        4 * p.parameter.numel()
        for p in hooks.placements
        for axis in ("tensor", "expert_tensor")
        if p.gradients.get(axis) in ("partial", "duplicated") and getattr(grid, axis).size > 1
    )
    answer = {
        "ranks": ranks,
        "rounds": rounds,
        "hooks": {
            "seconds_finalisation": statistics.median(t for a, _, _, d in quads for t in (a, d)),
            "seconds_hooks": statistics.median(t for _, b, c, _ in quads for t in (b, c)),
            "ratio": quartiles([(b + c) / (a + d) for a, b, c, d in quads]),
            "noise": quartiles([d / a for a, _, _, d in quads]),
        },
        "bytes_a_step": {"sent": sent, "least": least},
        "auditor": {f"interval_{interval}": looks(hooks, step, interval, count) for interval, count in ((1, rounds), (10, 100), (100, 100))},
    }
    print(json.dumps(answer))
    shutdown()


def looks(engine: Any, step: Any, interval: int, count: int) -> dict[str, float]:
    """`count` steps with the auditor at its interval: what its looks cost of their time."""
    audit, spent = engine.audit, []
    before_update = audit.before_update

    def timed(number: int) -> None:
        began = time.perf_counter()
        before_update(number)
        if audit.auditor.due(number):
            spent.append(time.perf_counter() - began)

    audit.before_update, audit.auditor.interval = timed, interval
    whole = sum(step(engine, 10**7 + number) for number in range(1, count + 1))  # 10**7: a multiple of every interval
    audit.before_update, audit.auditor.interval = before_update, 10**9
    return {"steps": count, "looks": len(spent), "seconds_look": statistics.median(spent), "ratio": whole / (whole - sum(spent))}


def quartiles(values: list[float]) -> dict[str, float]:
    """Median and the quartiles around it."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "low": low, "high": high}


def cpu() -> str:
    """Name of the processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()

"""FP8 on this machine's GPU: correctness first, then time against BF16, against unfused FP8 and against the floor.

    python benchmarks/fp8/run.py            everything; writes benchmarks/results/fp8.json and prints the table
    MEGALIGN_FP8_BACKEND=triton python ...  one rung of the ladder; otherwise each shape takes its fastest

Without a GPU the correctness part runs on the CPU reference and every time is "not measured". With one, nothing is timed
unless every result is right: fresh random inputs (the seed is printed), float64, K/128 in {1, 2, 3, 5}.
Times are the best of five means over four calls, by CUDA events, after warm-up. The floor of a kernel is its bytes over the bandwidth of a copy measured in
the same run, or its FLOPs over the data sheet's peak, whichever is larger.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fp8_checks import correctness
from fp8_layers import Bf16Experts, NaiveFp8Linear, torchao_layer

from megalign.kernels import backends, reference
from megalign.kernels.adamw import MixedPrecisionAdamW
from megalign.kernels.groups import GroupLayout
from megalign.kernels.linear import Fp8GroupedLinear, Fp8Linear
from megalign.kernels.logprob import linear_logprobs
from megalign.kernels.tuning import WORST_ERROR

BF16 = torch.bfloat16
Timer = Callable[[Callable[[], Any]], float]
PEAK_FP8 = {"H100": 1979e12, "H200": 1979e12}  # dense, NVIDIA's data sheets
# tokens, inputs, outputs, floor and goal of the ratio to BF16 (fp8.md)
SHAPES = [(8192, 4096, 4096, 1.10, 1.30), (8192, 7168, 2048, 1.10, 1.28), (8192, 7168, 18432, 1.15, 1.41), (4096, 1024, 1024, None, None)]
EXPERTS = (8, 32768, 7168, 4096, 1.10, 1.52)
LOGPROB = (8192, 4096, 131072)  # tokens, width, vocabulary
ADAMW = (4096, 4096)


def step_of(layer: torch.nn.Module, *inputs: torch.Tensor) -> Callable[[], None]:
    """Forward and backward with a given upstream, gradients dropped."""
    x = inputs[0].requires_grad_()
    upstream = torch.randn_like(layer(*inputs))

    def run() -> None:
        x.grad = None
        layer.zero_grad(set_to_none=True)
        layer(*inputs).backward(upstream)

    return run


def saved_bytes(layer: torch.nn.Module, *inputs: torch.Tensor) -> int:
    """Bytes that autograd keeps for one call, parameters aside."""
    own, saved = {p.data_ptr() for p in layer.parameters()}, {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.setdefault(t.data_ptr(), t.nbytes), t)[1], lambda t: t):
        layer(*inputs)
    return sum(size for address, size in saved.items() if address not in own)


def time_layers(device: torch.device, timer: Timer, shapes: list[tuple[Any, ...]], experts: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Forward and backward, quantisation included; weights are quantised before, as the optimizer does."""
    table = []
    for m, k, n, floor, goal in shapes:
        x = torch.randn(m, k, device=device, dtype=BF16)
        plain = torch.nn.Linear(k, n, bias=False, device=device, dtype=BF16)
        fast, naive = Fp8Linear.of(plain), NaiveFp8Linear(k, n, bias=False, device=device, dtype=BF16)
        seconds = {"bf16": timer(step_of(plain, x)), "fp8": timer(step_of(fast, x)), "naive fp8": timer(step_of(naive, x))}
        other, absent = torchao_layer(plain)
        if other is not None:
            try:
                seconds["torchao"] = timer(step_of(other, x))
            except Exception as failure:  # another library's, which ends nothing here
                absent = f"torchao fails: {type(failure).__name__}: {failure}".splitlines()[0][:200]
        row = {"shape": f"{k} -> {n}, {m} tokens", "seconds": seconds, "floor": floor, "goal": goal, "torchao": absent or "timed"}
        row["saved bytes"] = {"bf16": saved_bytes(plain, x), "fp8": saved_bytes(fast, x), "naive fp8": saved_bytes(naive, x)}
        table.append(row)
    groups, m, k, n, floor, goal = experts
    x, sizes = torch.randn(m, k, device=device, dtype=BF16), torch.full((groups,), m // groups, device=device)
    plain, fast = Bf16Experts(groups, k, n, device), Fp8GroupedLinear(groups, k, n, device=device)
    seconds = {"bf16": timer(step_of(plain, x, sizes)), "fp8": timer(step_of(fast, x, sizes))}
    saved = {"bf16": saved_bytes(plain, x, sizes), "fp8": saved_bytes(fast, x, sizes)}
    table.append({"shape": f"{groups} experts, {k} -> {n}, {m} tokens", "seconds": seconds, "floor": floor, "goal": goal, "saved bytes": saved})
    for row in table:
        row["fp8 over bf16"] = row["seconds"]["bf16"] / row["seconds"]["fp8"]
        if "naive fp8" in row["seconds"]:
            row["fp8 over naive"] = row["seconds"]["naive fp8"] / row["seconds"]["fp8"]
    return table


def time_kernels(
    device: torch.device, timer: Timer, shapes: list[tuple[Any, ...]], experts: tuple[Any, ...], logprob: tuple[int, int, int], bandwidth: float, peak: float
) -> list[dict[str, Any]]:
    """Each kernel against its floor, and every rung of the ladder that this machine has for the matmuls."""
    table = []

    def add(name: str, run: Callable[[], Any], size: float, flops: float = 0.0) -> None:
        seconds, floor = timer(run), max(size / bandwidth, flops / peak)
        table.append({"kernel": name, "seconds": seconds, "floor": floor, "share of floor": floor / seconds, "TB/s": size / seconds / 1e12, "TFLOP/s": flops / seconds / 1e12})

    for m, k, n, *_ in shapes:
        x, w, dy = (torch.randn(a, b, device=device, dtype=BF16) for a, b in ((m, k), (n, k), (m, n)))
        size = f"{k} -> {n}, {m} tokens"
        add(f"quantise rows, both layouts, {size}", lambda x=x: backends.quantise_rows_both(x), 4 * m * k)
        add(f"quantise blocks, both layouts, {size}", lambda w=w: backends.quantise_blocks_both(w), 4 * n * k)
        gamma, da = torch.ones(k, device=device, dtype=BF16), torch.randn(m, k // 2, device=device, dtype=BF16)
        add(f"RMSNorm + quantise, {size}", lambda x=x, gamma=gamma: backends.rms_norm_quantise(x, gamma), 4 * m * k)
        add(f"SwiGLU + quantise, {size}", lambda x=x: backends.swiglu_quantise(x), 3 * m * k)
        add(f"SwiGLU backward + quantise, {size}", lambda x=x, da=da: backends.swiglu_quantise_backward(x, da), 5 * m * k)
        (rows, x_t), (_, dy_t), blocks = backends.quantise_rows_both(x), backends.quantise_rows_both(dy), backends.quantise_blocks(w)
        add(f"re-tiling, {size}", lambda rows=rows: backends.retile(rows), 2 * m * k)
        flops, main = 2 * m * n * k, torch.zeros(n, k, device=device)
        matmuls: list[tuple[Any, ...]] = [
            ("matmul", (rows, blocks), BF16, m * k + n * k + 2 * m * n),
            ("wgrad", (dy_t, x_t), torch.float32, m * k + m * n + 4 * n * k),
        ]
        for operation, operands, dtype, moved in matmuls:
            exact = getattr(reference, operation)(*operands, dtype=torch.float32)
            ways = backends.candidates(operation, m, n, k, device) or {"reference": getattr(reference, operation)}
            for way, run in ways.items():
                name, call = f"{operation} {way}, {size}", functools.partial(run, *operands, dtype=dtype)
                wrong = why_wrong(call, exact)
                if wrong:
                    table.append({"kernel": name, "out": wrong})
                else:
                    add(name, call, moved, flops)
            del exact
        add(f"wgrad added to FP32, {size}", lambda dy_t=dy_t, x_t=x_t, main=main: backends.wgrad(dy_t, x_t, main), m * k + m * n + 8 * n * k, flops)
        add(f"BF16 matmul of torch, {size}", lambda x=x, w=w: x @ w.t(), 2 * (m * k + n * k + m * n), 2 * flops)  # half of FP8's peak
    groups, m, k, n, *_ = experts
    layout = GroupLayout.of(torch.full((groups,), m // groups), m, device)
    x, dy = (layout.pad(torch.randn(m, width, device=device, dtype=BF16)) for width in (k, n))
    (rows, x_t), (_, dy_t) = backends.quantise_rows_both(x), backends.quantise_rows_both(dy)
    blocks, main = backends.quantise_blocks(torch.randn(groups, n, k, device=device, dtype=BF16)), torch.zeros(groups, n, k, device=device)
    size, flops = f"{groups} experts, {k} -> {n}, {m} tokens", 2 * m * n * k
    add(f"grouped matmul, {size}", lambda: backends.grouped_matmul(rows, blocks, layout), m * k + groups * n * k + 2 * m * n, flops)
    add(f"grouped wgrad added to FP32, {size}", lambda: backends.grouped_wgrad(dy_t, x_t, layout, main), m * k + m * n + 8 * groups * n * k, flops)
    tokens, depth, vocabulary = logprob
    hidden, head = torch.randn(tokens, depth, device=device, dtype=BF16), torch.randn(vocabulary, depth, device=device, dtype=BF16)
    targets = torch.randint(0, vocabulary, (tokens,), device=device)
    moved, flops = 2 * (tokens + vocabulary) * depth, 2 * tokens * depth * vocabulary
    size = f"{tokens} tokens, {depth} -> {vocabulary}"
    add(f"log-probs of {size}", lambda: linear_logprobs(hidden, head, targets), moved, 2 * flops)
    found, inputs = linear_logprobs(hidden.requires_grad_(), head.requires_grad_(), targets).logprobs, (hidden, head)
    upstream = torch.randn_like(found)
    torch.autograd.grad(found, inputs, upstream, retain_graph=True)  # the first may find what forward kept; those after compute the logits again
    add(f"log-probs backward of {size}", lambda: torch.autograd.grad(found, inputs, upstream, retain_graph=True), 2 * moved, 6 * flops)
    return table


def why_wrong(call: Callable[[], torch.Tensor], exact: torch.Tensor) -> str | None:
    """Why a way of computing `exact` is not timed: it fails, or gives something else."""
    try:
        error = float((call().float() - exact).norm() / exact.norm())
    except Exception as failure:  # a rung of another library may fail in any way, and the others are still of interest
        return f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
    return None if error <= WORST_ERROR else f"wrong: relative error {error:.1e}"


def time_adamw(device: torch.device, timer: Timer, shape: tuple[int, int], bandwidth: float) -> list[dict[str, Any]]:
    """Bytes over time: masters 8, moments 8 (BF16) or 16, gradient 2, parameter 2, FP8 copies 2; torch on FP32: 28."""
    table = []

    def add(name: str, optimizer: torch.optim.Optimizer, size: int) -> None:
        seconds, count = timer(optimizer.step), shape[0] * shape[1]
        table.append({"optimizer": name, "seconds": seconds, "bytes a weight": size, "TB/s": size * count / seconds / 1e12, "share of bandwidth": size * count / seconds / bandwidth})

    for name, fp8, moments, size in (("BF16, BF16 moments", False, BF16, 20), ("FP8, BF16 moments", True, BF16, 22), ("FP8, FP32 moments", True, torch.float32, 30)):
        weight = Fp8Linear(shape[1], shape[0], bias=False, device=device).weight if fp8 else torch.nn.Parameter(torch.randn(shape, device=device, dtype=BF16))
        weight.grad = torch.randn_like(weight)
        add(f"MixedPrecisionAdamW {name}", MixedPrecisionAdamW([weight], first_moment=moments, second_moment=moments), size)
    weight = torch.nn.Parameter(torch.randn(shape, device=device))
    weight.grad = torch.randn_like(weight)
    add("torch.optim.AdamW(fused=True) FP32", torch.optim.AdamW([weight], fused=True), 28)
    return table


def measured(
    device: torch.device, timer: Timer, shapes: list[tuple[Any, ...]], experts: tuple[Any, ...], logprob: tuple[int, int, int], adamw: tuple[int, int],
    peak: float, copy: int = 2**30,
) -> dict[str, Any]:  # fmt: skip
    source, target = torch.empty(2, copy, dtype=torch.uint8, device=device)
    bandwidth = 2 * copy / timer(lambda: target.copy_(source))
    return {
        "copy TB/s": bandwidth / 1e12,
        "layers": time_layers(device, timer, shapes, experts),
        "kernels": time_kernels(device, timer, shapes, experts, logprob, bandwidth, peak),
        "adamw": time_adamw(device, timer, adamw, bandwidth),
    }


def table_of(result: dict[str, Any]) -> str:
    """Markdown. Without a GPU every time says so."""
    lines = ["| layer | FP8 over BF16 | floor | goal | FP8 over naive FP8 | saved for backward, FP8 / BF16 |", "|---|---|---|---|---|---|"]
    if result["measured"] is None:
        groups, tokens, k, n, floor, goal = EXPERTS
        rows = [(f"{k} -> {n}, {m} tokens", floor, goal) for m, k, n, floor, goal in SHAPES] + [(f"{groups} experts, {k} -> {n}, {tokens} tokens", floor, goal)]
        return "\n".join([*lines, *(f"| {name} | not measured | {floor or ''} | {goal or ''} | not measured | not measured |" for name, floor, goal in rows)])
    for row in result["measured"]["layers"]:
        naive = f"{row['fp8 over naive']:.2f}x" if "fp8 over naive" in row else ""
        share = row["saved bytes"]["fp8"] / row["saved bytes"]["bf16"]
        lines.append(f"| {row['shape']} | {row['fp8 over bf16']:.2f}x | {row['floor'] or ''} | {row['goal'] or ''} | {naive} | {share:.2f} |")
    lines += ["", "| kernel | ms | share of its floor |", "|---|---|---|"]
    for row in result["measured"]["kernels"]:
        lines.append(f"| {row['kernel']} | {row['out']} | |" if "out" in row else f"| {row['kernel']} | {row['seconds'] * 1e3:.3f} | {row['share of floor']:.0%} |")
    lines += ["", "| optimizer | ms | share of copy bandwidth |", "|---|---|---|"]
    lines += [f"| {row['optimizer']} | {row['seconds'] * 1e3:.3f} | {row['share of bandwidth']:.0%} |" for row in result["measured"]["adamw"]]
    return "\n".join(lines)


def versions(device: torch.device) -> dict[str, Any]:
    try:
        import triton

        found = triton.__version__
    except ImportError:
        found = None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": f"{device.type}: {name}", "torch": torch.__version__, "cuda": torch.version.cuda, "triton": found, "python": platform.python_version()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "results" / "fp8.json")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result: dict[str, Any] = {**versions(device), "seed": arguments.seed, "backend": os.environ.get("MEGALIGN_FP8_BACKEND", "auto")}
    result["relative errors against float64"] = correctness(device, arguments.seed)
    result["measured"] = None
    if device.type == "cuda":
        from megalign.kernels.tuning import cuda_seconds

        peak = next((flops for name, flops in PEAK_FP8.items() if name in torch.cuda.get_device_name()), 1979e12)
        result["measured"] = measured(device, cuda_seconds, SHAPES, EXPERTS, LOGPROB, ADAMW, peak)
    else:
        print("No CUDA device: results are checked on the CPU reference, nothing is timed.\n")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(table_of(result))
    print(f"\n{result['device']}, torch {result['torch']}, triton {result['triton']}; {arguments.output}")


if __name__ == "__main__":
    main()

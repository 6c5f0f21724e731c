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
import json
import os
import platform
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fp8_layers import Bf16Experts, NaiveFp8Linear, torchao_layer

from megalign.kernels import backends, fused, reference
from megalign.kernels.adamw import MixedPrecisionAdamW
from megalign.kernels.linear import Fp8GroupedLinear, Fp8Linear

BF16 = torch.bfloat16
Timer = Callable[[Callable[[], Any]], float]
PEAK_FP8 = {"H100": 1979e12, "H200": 1979e12}  # dense, NVIDIA's data sheets
# tokens, inputs, outputs, floor and goal of the ratio to BF16 (fp8.md)
SHAPES = [(8192, 4096, 4096, 1.10, 1.30), (8192, 7168, 2048, 1.10, 1.28), (8192, 7168, 18432, 1.15, 1.41), (4096, 1024, 1024, None, None)]
EXPERTS = (8, 32768, 7168, 4096, 1.10, 1.52)
ADAMW = (4096, 4096)


def correctness(device: torch.device, seed: int) -> dict[str, float]:
    """Largest relative error of each result against float64. Raises AssertionError if one is out of fp8.md's bounds."""
    torch.manual_seed(seed)
    worst: dict[str, float] = {}

    def check(name: str, found: torch.Tensor, exact: torch.Tensor, low: float, high: float) -> None:
        error = float((found.detach().double() - exact).norm() / exact.norm())
        worst[name] = max(worst.get(name, 0.0), error)
        assert low < error < high, f"{name}: relative error {error:.2e}, expected between {low} and {high}; nothing is timed (seed {seed})"

    for steps in (1, 2, 3, 5):
        m, n, k = 384, 256, 128 * steps
        layer = Fp8Linear(k, n, bias=False, device=device)
        x = torch.randn(m, k, device=device, dtype=BF16, requires_grad=True)
        dy = torch.randn(m, n, device=device, dtype=BF16)
        y = layer(x)
        y.backward(dy)
        assert x.grad is not None and layer.weight.grad is not None
        x64, w64, dy64 = x.detach().double(), layer.weight.detach().double(), dy.double()
        for name, found, exact in (("forward", y, x64 @ w64.t()), ("dgrad", x.grad, dy64 @ w64), ("wgrad", layer.weight.grad, dy64.t() @ x64)):
            check(f"{name} against unquantised", found, exact, 0.030, 0.045)
        rows, (w, _) = backends.quantise_rows(x.detach()), layer.fp8()
        exact = reference.dequantise(rows, torch.float64) @ reference.dequantise(w, torch.float64).t()
        check("matmul against its own FP8 operands", backends.matmul(rows, w), exact, 0, 2.5e-3)
        expected, found = reference.quantise_rows_both(x.detach()), backends.quantise_rows_both(x.detach())
        for a, b in zip(found, expected):
            assert torch.equal(a.data.view(torch.uint8), b.data.view(torch.uint8)) and torch.equal(a.scale, b.scale), "quantisation differs from the reference"
    if device.type == "cuda":
        correct_optimizer(device)
    return worst


def correct_optimizer(device: torch.device) -> None:
    """The fused AdamW leaves the bits of the torch path, on this device."""
    states = []
    for backend in ("torch", "triton"):
        torch.manual_seed(1)
        layer = Fp8Linear(384, 256, bias=False, device=device)
        optimizer = MixedPrecisionAdamW([("w", layer.weight)], lr=1e-2, backend=backend)
        for _ in range(3):
            layer.weight.grad = torch.randn_like(layer.weight)
            optimizer.step()
        states.append([optimizer.master(layer.weight), *(optimizer.state[layer.weight][name] for name in ("exp_avg", "exp_avg_sq")), layer.fp8()[1].data.view(torch.uint8)])
    assert all(torch.equal(a, b) for a, b in zip(*states)), "the fused AdamW differs from the torch path"


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
            seconds["torchao"] = timer(step_of(other, x))
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


def time_kernels(device: torch.device, timer: Timer, shapes: list[tuple[Any, ...]], bandwidth: float, peak: float) -> list[dict[str, Any]]:
    """Each kernel against its floor, and every rung of the ladder that this machine has for the matmuls."""
    table = []

    def add(name: str, run: Callable[[], Any], size: float, flops: float = 0.0) -> None:
        seconds, floor = timer(run), max(size / bandwidth, flops / peak)
        table.append({"kernel": name, "seconds": seconds, "floor": floor, "share of floor": floor / seconds, "TB/s": size / seconds / 1e12, "TFLOP/s": flops / seconds / 1e12})

    kernels: Any = fused
    if device.type == "cuda":
        from megalign.kernels import fused_triton as kernels
    for m, k, n, *_ in shapes:
        x, w, dy = (torch.randn(a, b, device=device, dtype=BF16) for a, b in ((m, k), (n, k), (m, n)))
        size = f"{k} -> {n}, {m} tokens"
        add(f"quantise rows, both layouts, {size}", lambda x=x: backends.quantise_rows_both(x), 4 * m * k)
        add(f"quantise blocks, both layouts, {size}", lambda w=w: backends.quantise_blocks_both(w), 4 * n * k)
        add(f"RMSNorm + quantise, {size}", lambda x=x, k=k: kernels.rms_norm_quantise(x, torch.ones(k, device=device, dtype=BF16)), 4 * m * k)
        add(f"SwiGLU + quantise, {size}", lambda x=x: kernels.swiglu_quantise(x), 3 * m * k)
        da = torch.randn(m, k // 2, device=device, dtype=BF16)
        add(f"SwiGLU backward + quantise, {size}", lambda x=x, da=da: kernels.swiglu_quantise_backward(x, da), 5 * m * k)
        (rows, x_t), (_, dy_t), blocks = backends.quantise_rows_both(x), backends.quantise_rows_both(dy), backends.quantise_blocks(w)
        flops = 2 * m * n * k
        matmuls: list[tuple[Any, ...]] = [
            ("matmul", (rows, blocks), BF16, m * k + n * k + 2 * m * n),
            ("wgrad", (dy_t, x_t), torch.float32, m * k + m * n + 4 * n * k),
        ]
        for operation, operands, dtype, moved in matmuls:
            ways = backends.candidates(operation, m, n, k, device) or {"reference": getattr(reference, operation)}
            for way, run in ways.items():
                add(f"{operation} {way}, {size}", lambda run=run, operands=operands, dtype=dtype: run(*operands, dtype=dtype), moved, flops)
    return table


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


def measured(device: torch.device, timer: Timer, shapes: list[tuple[Any, ...]], experts: tuple[Any, ...], adamw: tuple[int, int], peak: float, copy: int = 2**30) -> dict[str, Any]:
    source, target = torch.empty(2, copy, dtype=torch.uint8, device=device)
    bandwidth = 2 * copy / timer(lambda: target.copy_(source))
    return {
        "copy TB/s": bandwidth / 1e12,
        "layers": time_layers(device, timer, shapes, experts),
        "kernels": time_kernels(device, timer, shapes, bandwidth, peak),
        "adamw": time_adamw(device, timer, adamw, bandwidth),
    }


def table_of(result: dict[str, Any]) -> str:
    """Markdown. Without a GPU every time says so."""
    lines = ["| layer | FP8 over BF16 | floor | goal | FP8 over naive FP8 | saved for backward, FP8 / BF16 |", "|---|---|---|---|---|---|"]
    if result["measured"] is None:
        return "\n".join([*lines, *(f"| {k} -> {n}, {m} tokens | not measured | {floor or ''} | {goal or ''} | not measured | not measured |" for m, k, n, floor, goal in SHAPES)])
    for row in result["measured"]["layers"]:
        naive = f"{row['fp8 over naive']:.2f}x" if "fp8 over naive" in row else ""
        share = row["saved bytes"]["fp8"] / row["saved bytes"]["bf16"]
        lines.append(f"| {row['shape']} | {row['fp8 over bf16']:.2f}x | {row['floor'] or ''} | {row['goal'] or ''} | {naive} | {share:.2f} |")
    lines += ["", "| kernel | ms | share of its floor |", "|---|---|---|"]
    lines += [f"| {row['kernel']} | {row['seconds'] * 1e3:.3f} | {row['share of floor']:.0%} |" for row in result["measured"]["kernels"]]
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
        result["measured"] = measured(device, cuda_seconds, SHAPES, EXPERTS, ADAMW, peak)
    else:
        print("No CUDA device: results are checked on the CPU reference, nothing is timed.\n")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(table_of(result))
    print(f"\n{result['device']}, torch {result['torch']}, triton {result['triton']}; {arguments.output}")


if __name__ == "__main__":
    main()

"""Attention over a packed row: one document at a time, or by a variable-length kernel, against one masked call over the whole row.

    python benchmarks/attention/run.py [--rounds 5]

Forward and backward of causal attention, 8 query and 4 key/value heads of size 64, documents of 64 to 512 tokens. "masked"
is what a packed row costs without variable-length attention: scaled_dot_product_attention under a T x T mask that is
block-diagonal and causal. On CUDA (BF16) each kernel that is installed is measured, on a CPU (FP32, one thread) the path by
documents. All ways must agree first. Rounds alternate, the fastest of each counts. Writes benchmarks/results/attention.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megalign.parallel import varlen

RESULTS = Path(__file__).parents[1] / "results" / "attention.json"
HEADS, GROUPS, SIZE = 8, 4, 64
SHORTEST, LONGEST = 64, 512
TOKENS = {"cpu": (512, 1024, 2048, 4096), "cuda": (4096, 16384, 32768)}
Way = Callable[[Tensor, Tensor, Tensor, list[int]], Tensor]


def documents_of(tokens: int) -> list[int]:
    """Lengths between SHORTEST and LONGEST that sum to `tokens`; the last is what is left."""
    numbers, lengths = np.random.RandomState(tokens), list[int]()
    while (left := tokens - sum(lengths)) > LONGEST:
        lengths.append(int(numbers.randint(SHORTEST, LONGEST + 1)))
    return [*lengths, left]


def block_mask(lengths: list[int], device: torch.device) -> Tensor:
    """[T, T], true where a query sees a key: in its own document, and not ahead."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    position = torch.arange(len(document), device=device)
    return (document[:, None] == document) & (position[:, None] >= position)


def masked(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], mask: Tensor | None = None) -> Tensor:
    mask = block_mask(lengths, q.device) if mask is None else mask
    k, v = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (k, v))
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)


def by_document(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    return varlen.by_document(q, k, v, lengths, lengths, causal=True, scale=None, dropout=0.0)


def by_kernel(kernel: Any, q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    end = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(q.device)
    return kernel(q, k, v, [end, end], (max(lengths), max(lengths)), True, SIZE**-0.5, 0.0)


def ways_of(device: torch.device) -> dict[str, Way]:
    found: dict[str, Way] = {"masked": masked, "documents": by_document}
    if device.type == "cuda":
        kernels = {"varlen": ("torch.nn.attention.varlen", varlen._torch_kernel), "flash_attn": ("flash_attn", varlen._package_kernel)}
        found |= {name: partial(by_kernel, kernel) for name, (module, kernel) in kernels.items() if varlen._installed(module)}
    return found


def once(way: Way, inputs: list[Tensor], lengths: list[int]) -> tuple[float, list[Tensor]]:
    """Seconds of forward and backward, and what came out: the output and three gradients."""
    for x in inputs:
        x.grad = None
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    out = way(inputs[0], inputs[1], inputs[2], lengths)
    out.backward(torch.ones_like(out))
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started, [out.detach(), *(x.grad for x in inputs if x.grad is not None)]


def measure(tokens: int, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    lengths, numbers = documents_of(tokens), torch.Generator().manual_seed(1)
    inputs = [torch.randn(tokens, heads, SIZE, generator=numbers).to(device, dtype).requires_grad_() for heads in (HEADS, GROUPS, GROUPS)]
    ways = ways_of(device)
    _, expected = once(masked, inputs, lengths)
    for name, way in ways.items():
        for one, other in zip(once(way, inputs, lengths)[1], expected, strict=True):
            off = float((one.float() - other.float()).abs().max() / other.float().abs().max())
            if off > (3e-2 if dtype == torch.bfloat16 else 1e-5):
                raise SystemExit(f"{name} differs from masked by {off:.1e} at {tokens} tokens: nothing is timed")
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            best[name] = min(best[name], once(way, inputs, lengths)[0])
    return [
        {"tokens": tokens, "documents": len(lengths), "way": name, "milliseconds": round(1e3 * seconds, 3), "masked_over_this": round(best["masked"] / seconds, 2),
         "mask_bytes": tokens**2 if name == "masked" else 0}
        for name, seconds in best.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    table = [row for tokens in TOKENS[device.type] for row in measure(tokens, device, arguments.rounds)]
    machine = {"device": torch.cuda.get_device_name() if device.type == "cuda" else cpu(), "cores": len(os.sched_getaffinity(0)), "load_average": os.getloadavg()[0],
               "python": platform.python_version(), "torch": torch.__version__}  # fmt: skip
    content: dict[str, Any] = {"command": "python benchmarks/attention/run.py", "machine": machine, "table": table}
    if device.type != "cuda":
        content["cuda"] = "not measured"
    arguments.output.write_text(json.dumps(content, indent=1) + "\n")
    for row in table:
        print(row)


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()

"""Model FLOPs utilisation: what the model needs for a token, over what this device was seen to do.

The peak is measured, not read from a data sheet: it exists for every device, laptops included, and
says how far a run is from what torch's own matmul reaches here, today, next to the other processes.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megalign.config.hardware import Device
from megalign.parallel.init import cpu_cores

MEASURED_SECONDS = 0.2
# Large enough to be bound by arithmetic, small enough for a few rounds in the time above.
MATMUL_SIZE = {"cuda": 8192, "cpu": 768}


def device_peak_flops(dtype: torch.dtype, device: str | torch.device | None = None) -> float:
    """Best observed FLOP/s of a square matmul in `dtype` on `device` (default: CUDA if there is one).

    Takes about 0.2 s at the first call, then is remembered for the process. It draws no number from
    torch's global generators and hands its memory back, so calling it does not change a run.
    """
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
    return _measure(dtype, torch.device(device))


@cache
def _measure(dtype: torch.dtype, device: torch.device) -> float:
    size = MATMUL_SIZE.get(device.type, 1024)
    seconds = _best_seconds(size, dtype, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return 2 * size**3 / seconds


def _best_seconds(size: int, dtype: torch.dtype, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """The fastest of the matmuls of two square matrices that fit into `MEASURED_SECONDS`."""
    generator = torch.Generator(device=device).manual_seed(
        0
    )  # random: constant operands clock higher than real ones
    left, right = (torch.randn(size, size, generator=generator, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)

    def seconds_for_one() -> float:
        started = clock()
        torch.mm(left, right, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - started

    seconds_for_one()  # loads kernels, wakes clocks and threads
    timings = [seconds_for_one()]
    while sum(timings) < MEASURED_SECONDS:
        timings.append(seconds_for_one())
    return min(timings)


def measured_cpu(ranks: int, precision: str) -> Device:
    """This machine as `ranks` devices of one thread each, its cores shared when there are fewer: measured, about 1 s.

    Matmul as `device_peak_flops` does it, memory by copying 64 MB, the wire by a loopback socket, over which gloo sends, an
    operation by a chain of small modules forward and backward. All but the wire in seconds of this thread: what else runs on
    the cores, other ranks that measure at the same moment above all, does not count.
    """
    import psutil

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        share = min(1.0, cpu_cores() / ranks)
        size, dtype = MATMUL_SIZE["cpu"], torch.bfloat16 if precision == "bf16" else torch.float32
        peak = 2 * size**3 / _best_seconds(size, dtype, torch.device("cpu"), time.thread_time) * share  # now, not when the process began
        copied = _copy_rate() * share
        launch = _operation_seconds() / share
    finally:
        torch.set_num_threads(threads)
    memory, wire = psutil.virtual_memory().total / ranks, _socket_rate() * share
    return Device("cpu", memory, peak, peak, copied, wire, wire, ranks, f"measured here, {cpu_cores()} cores", matmul_share=1.0, kind="cpu", launch=launch)


def _operation_seconds(blocks: int = 32) -> float:
    """What one dispatched operation takes when its arithmetic is nothing: norm, linear layers, gate and residual at width 8."""
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.RMSNorm(8), nn.Linear(8, 16), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate, value = self.up(self.norm(x)).chunk(2, -1)
            return x + self.down(nn.functional.silu(gate) * value)

    with torch.random.fork_rng(devices=[]):
        model, x = nn.Sequential(*[Block() for _ in range(blocks)]), torch.ones(4, 8)

    def once() -> float:
        model.zero_grad()
        started = time.thread_time()
        model(x).sum().backward()
        return time.thread_time() - started

    once()
    with _Count() as counted:
        once()
    return min(once() for _ in range(10)) / counted.operations


class _Count(TorchDispatchMode):
    """Counts the operations that reach a backend."""

    operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*args, **(kwargs or {}))


def _copy_rate(size: int = 64 * 2**20) -> float:
    """Bytes read and written a second by a copy."""
    source, target = torch.ones(size // 4), torch.empty(size // 4)
    best = float("inf")
    for _ in range(6):
        started = time.thread_time()
        target.copy_(source)
        best = min(best, time.thread_time() - started)
    return 2 * size / best


def _socket_rate(size: int = 32 * 2**20) -> float:
    """Bytes a second through a TCP connection of this machine to itself."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = socket.create_connection(server.getsockname())
        receiver, _ = server.accept()
    with sender, receiver:
        thread = threading.Thread(target=sender.sendall, args=(bytes(size),))
        started = time.perf_counter()
        thread.start()
        buffer, got = bytearray(2**20), 0
        while got < size:
            got += receiver.recv_into(buffer)
        thread.join()
        return size / (time.perf_counter() - started)


def model_flops_per_token(
    active_parameters: int,
    *,
    embedding_parameters: int = 0,
    num_layers: int,
    num_attention_heads: int,
    kv_channels: float,
    sequence_length: float,
    frozen: bool = False,
) -> float:
    """FLOPs of forward and backward for one token: `6 N + 12 L H K S` (PaLM, arXiv 2204.02311, appendix B).

    frozen: no weight has a gradient, as under adapters: `4 N + 12 L H K S`, and what the adapters add is not counted.

    N: parameters that multiply this token, so the active experts only, and without the input
    embedding, which is a lookup: `active_parameters - embedding_parameters`. With tied embeddings the
    table multiplies as output layer: leave `embedding_parameters` at 0.
    L layers, H query heads, K head size (of scores and values, their mean where they differ), S keys that a token attends to: the sequence length, or with
    packing the token-weighted mean document length. As in the source, causal masking is not deducted
    and recomputation of activations is not counted.
    """
    matmul_parameters = active_parameters - embedding_parameters
    return (4.0 if frozen else 6.0) * matmul_parameters + 12.0 * num_layers * num_attention_heads * kv_channels * sequence_length


def model_flops_utilization(
    tokens_per_second: float, flops_per_token: float, *, peak_flops: float, num_devices: int = 1
) -> float:
    """Share of the peak (0 to 1) that the model's own FLOPs use; `tokens_per_second` over all devices."""
    return tokens_per_second * flops_per_token / (peak_flops * num_devices)

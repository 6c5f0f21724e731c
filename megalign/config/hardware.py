"""What a device can do: numbers of vendors' data sheets, named as such, or measured ones (`megalign.planner`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Peaks of one device and of the wires to others. Rates in bytes or FLOPs a second, wires one way.

    matmul_share: what a model's matmuls reach of the peak. An assumption where `source` is a data sheet (large
    matmuls on Hopper are usually reported between 0.5 and 0.75); 1 where the peak is that of a measured matmul.
    launch: what an operation costs the processor besides its arithmetic: dispatch, autograd, Python. 0 for a GPU, which
    runs behind its launches; there a model of small operations is slower than planned.
    usable: share of the memory that planned parts may fill; the framework, communication buffers, gradients of
    activations and fragmentation take the rest.
    """

    name: str
    memory: float
    bf16: float
    fp32: float
    memory_bandwidth: float
    link: float  # to a device of the same node
    network: float  # to a device of another node
    node_size: int
    source: str
    matmul_share: float = 0.6
    usable: float = 0.9
    launch: float = 0.0  # seconds
    kind: str = "cuda"

    def flops(self, precision: str) -> float:
        return self.bf16 if precision == "bf16" else self.fp32


def _nvidia(name: str, gigabytes: float, bf16: float, fp32: float, terabytes: float, nvlink: float, gigabits: float, sheet: str) -> Device:
    return Device(
        name=name,
        memory=gigabytes * 1e9,
        bf16=bf16 * 1e12,
        fp32=fp32 * 1e12,
        memory_bandwidth=terabytes * 1e12,
        link=nvlink / 2 * 1e9,  # data sheets add both directions
        network=gigabits / 8 * 1e9,
        node_size=8,
        source=f"data sheet: {sheet}; {gigabits:g} Gbit/s of network a GPU assumed",
    )


# BF16 without sparsity, FP32 without tensor cores (our matmuls do not ask for TF32).
DEVICES = {
    device.name: device
    for device in (
        _nvidia("a100-40gb", 40, 312, 19.5, 1.555, 600, 200, "NVIDIA A100 40GB SXM"),
        _nvidia("a100-80gb", 80, 312, 19.5, 2.039, 600, 200, "NVIDIA A100 80GB SXM"),
        _nvidia("h100-80gb", 80, 989, 67, 3.35, 900, 400, "NVIDIA H100 SXM"),
        _nvidia("h200-141gb", 141, 989, 67, 4.8, 900, 400, "NVIDIA H200 SXM"),
        _nvidia("b200-180gb", 180, 2250, 75, 7.7, 1800, 400, "NVIDIA HGX B200"),
    )
}

"""Launching a Triton kernel where its tensors are, or saying why it cannot be."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from megalign.kernels.tiles import Fp8Error


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, device: torch.device, **options: Any) -> None:
    """kernel[grid](*arguments, **options) on `device`, whatever device is current.

    Raises Fp8Error for CPU tensors, unless the kernel is interpreted (TRITON_INTERPRET=1 when it was defined).
    """
    if device.type == "cuda":
        on_device: contextlib.AbstractContextManager[Any] = torch.cuda.device(device)
    elif type(kernel).__name__ == "InterpretedFunction":
        on_device = contextlib.nullcontext()
    else:
        raise Fp8Error(f"{getattr(kernel, '__name__', kernel)} runs on CUDA, its tensors are on {device}; use the reference backend there")
    with on_device:
        kernel[grid](*arguments, **options)


def processors(device: torch.device) -> int:
    """Programs of a persistent kernel: one for each multiprocessor; a few in the interpreter, so that each has several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3

"""What `megalign kernels` prints: which FP8 backends this machine has, and what each shape takes."""

from __future__ import annotations

import torch

from megalign.kernels import backends, tuning
from megalign.kernels.tiles import Fp8Error

SHAPES = ((8192, 4096, 4096), (8192, 2048, 7168), (8192, 18432, 7168), (4096, 1024, 1024))  # tokens, out, in: fp8.md's


def parse_shape(text: str) -> tuple[int, int, int]:
    """"8192x4096x7168" -> (tokens, out, in). Raises Fp8Error."""
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
        raise Fp8Error(f"shape {text!r} is not TOKENSxOUTxIN, e.g. 8192x4096x7168")
    tokens, out, into = map(int, parts)
    return tokens, out, into


def overview(shapes: list[tuple[int, int, int]], device: torch.device) -> list[str]:
    """Lines: the machine, each rung and why it is out, and for each shape what forward, dgrad and wgrad (added to FP32) take."""
    found = tuning.machine(device)
    lines = [f"device {found['device']}, torch {found['torch']}, triton {found['triton']}; forced: {backends.forced() or 'none'}"]
    if device.type == "cuda":
        lines.append(f"table  {tuning.table_path(device)}")
    lines += ["", f"{'backend':12}here"]
    for backend in backends.LADDER:
        lines.append(f"{backend:12}{backends.why_not(backend, device) or 'yes'}")
    lines += ["", f"{'tokens x out x in':24}{'layer':8}{'forward':16}{'dgrad':16}{'wgrad':16}why"]
    for tokens, out, into in shapes:
        choices = [
            backends.choose("matmul", tokens, out, into, device),
            backends.choose("matmul", tokens, into, out, device),
            backends.choose("wgrad", tokens, out, into, device, torch.float32, True),
        ]
        name = f"{tokens} x {out} x {into}"
        lines.append(f"{name:24}{backends.precision(tokens, out, into, device):8}{''.join(f'{choice!s:16}' for choice in choices)}{choices[0].source}")
    return lines

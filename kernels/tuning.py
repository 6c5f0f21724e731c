"""Which of several ways is the fastest for a shape on this machine: measured once, kept in a file.

A table is JSON: the machine it was measured on, and a row for each operation and shape with what was chosen, the
seconds of every candidate and why some are out. A candidate is out if it fails or if its result is wrong: each is
compared with the reference on fresh random operands before it is timed, so a kernel that a new driver or a new Triton
breaks is never chosen, however fast.

The file is $MEGALIGN_FP8_TABLE, or ~/.cache/megalign/fp8-<device>-torch-<version>-triton-<version>.json. Writers
replace it as a whole; a damaged or foreign table is measured again.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = 1
WORST_ERROR = 5e-3  # relative, against the reference: BF16 rounding is 1.7e-3, Hopper's short accumulation within a step adds less

Timer = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True)
class Row:
    """What was measured for one operation and shape; `out` holds the reasons of candidates that may not be chosen."""

    chosen: str
    seconds: dict[str, float] = field(default_factory=dict)
    out: dict[str, str] = field(default_factory=dict)


def machine(device: torch.device) -> dict[str, str]:
    """What a measurement holds for: device, torch, Triton."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return {"device": name, "torch": torch.__version__, "triton": triton}


def table_path(device: torch.device) -> Path:
    if "MEGALIGN_FP8_TABLE" in os.environ:
        return Path(os.environ["MEGALIGN_FP8_TABLE"])
    found = machine(device)
    name = re.sub(r"[^A-Za-z0-9.+-]+", "-", f"fp8-{found['device']}-torch-{found['torch']}-triton-{found['triton']}")
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "megalign" / f"{name}.json"


def load(path: Path, device: torch.device) -> dict[str, Row]:
    """Rows of the table at `path`; none if it is absent, damaged or of another machine."""
    try:
        found = json.loads(path.read_text())
        if found["format"] != FORMAT or found["machine"] != machine(device):
            return {}
        return {key: Row(**row) for key, row in found["rows"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def save(path: Path, device: torch.device, rows: dict[str, Row]) -> None:
    """Add `rows` to the table at `path`; processes that write at once may lose a row, never damage the file."""
    merged = {**load(path, device), **rows}
    text = json.dumps({"format": FORMAT, "machine": machine(device), "rows": {k: asdict(r) for k, r in sorted(merged.items())}}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


def measure(candidates: dict[str, Callable[[], Tensor]], checks: dict[str, Callable[[], Tensor]], reference: Callable[[], Tensor], timer: Timer) -> Row:
    """The fastest candidate among those whose `checks` agree with `reference`; "reference" if none does. Raises OutOfMemoryError."""
    expected = reference().float()
    seconds: dict[str, float] = {}
    out: dict[str, str] = {}
    for name, run in candidates.items():
        try:
            got = checks[name]().float()
            error = ((got - expected).norm() / expected.norm().clamp(min=1e-30)).item()
            if got.shape != expected.shape or not error <= WORST_ERROR:
                out[name] = f"wrong: relative error {error:.1e}"
                continue
            seconds[name] = timer(run)
        except torch.OutOfMemoryError:  # the model fills the device: that says nothing of the candidate
            raise
        except Exception as failure:  # a candidate of another machine's library may fail in any way
            out[name] = f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
    return Row(min(seconds, key=lambda name: seconds[name]) if seconds else "reference", seconds, out)


def cuda_seconds(run: Callable[[], Any], repeats: int = 5, calls: int = 4) -> float:
    """Best of `repeats` means over `calls`, by the device's clock."""
    run()
    best = math.inf
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / calls / 1e3)
    return best

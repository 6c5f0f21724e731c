"""What the doctor finds on every rank, with a fault put in where asked."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megalign.doctor.world import world_findings
from megalign.parallel.init import read_world


def healthy_and_broken(folder: Path) -> dict[str, list[tuple[str, str, str, str]]]:
    """The same world once as it is and once with each fault: {fault: [(section, item, value, verdict)]}."""
    world = read_world(os.environ)
    last = world.rank == world.size - 1
    found: dict[str, Any] = {"none": world_findings(world, folder)}
    found["clock 2 s off"] = world_findings(world, folder, clock=lambda: time.time() + 2 * last)
    found["clock a minute off"] = world_findings(world, folder, clock=lambda: time.time() - 60 * last)
    found["a folder of one node only"] = world_findings(world, folder / ("elsewhere" if last else "here"))

    flock, open_, all_reduce = fcntl.flock, os.open, dist.all_reduce
    fcntl.flock = lambda *_: None
    found["locks that do not lock"] = world_findings(world, folder)
    fcntl.flock = flock
    os.open = lambda path, flags, *more, **names: open_(path, flags & ~os.O_EXCL, *more, **names)  # type: ignore[assignment]
    found["O_EXCL ignored"] = world_findings(world, folder)
    os.open = open_

    def wrong(tensor: Any, *arguments: Any, **names: Any) -> None:
        all_reduce(tensor, *arguments, **names)
        tensor += last

    dist.all_reduce = wrong
    found["wrong sums"] = world_findings(world, folder)
    dist.all_reduce = all_reduce
    return {fault: [(f.section, f.item, f.value, f.verdict) for f in findings] for fault, findings in found.items()}

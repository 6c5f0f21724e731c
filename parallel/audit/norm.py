"""The global gradient norm, computed again without the flags by which the optimizer counts.

    norm^2 = sum over keys of the squared norm of the gradient of the FIRST rank that holds it
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megalign.parallel.audit import findings as f
from megalign.parallel.audit.compare import Comparison, Row
from megalign.parallel.audit.findings import Finding
from megalign.parallel.audit.held import COUNTED, Entry, parts_of
from megalign.parallel.init import device

TOLERANCE = 1e-4  # relative; the optimizer's norm is accumulated in FP32


@torch.no_grad()
def recomputed(entries: Sequence[Entry], comparison: Comparison, rank: int) -> float:
    """The norm of all gradients, each logical element once, in FP64 (collective; after `comparison.run`)."""
    total = torch.zeros(1, dtype=torch.float64, device=device())
    once = {entry.label: entry for entry in entries if entry.kind == "gradient"}  # virtual stages of a rank may hold copies
    for label, entry in once.items():
        if comparison.holders(label)[0] == rank:
            total += entry.value.double().square().sum()
    dist.all_reduce(total)
    return math.sqrt(total.item())


def stats_groups(optimizer: Any) -> list[list[tuple[int, ...]]]:
    """Rank -> for each of its optimizers the ranks over which it adds up its part of the norm (collective)."""
    mine = [tuple(dist.get_process_group_ranks(part.get_grad_stats_parallel_group())) for part in parts_of(optimizer)]
    groups: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(groups, mine)
    return groups


def counting(rows: Sequence[Row], groups: Sequence[Sequence[tuple[int, ...]]]) -> list[Finding]:
    """Parameters that the optimizer counts not exactly once in a norm."""
    counts: dict[tuple[str, tuple[int, ...]], list[Row]] = {}
    for row in rows:
        if row.kind == "gradient":
            counts.setdefault((row.label, groups[row.rank][row.part]), []).append(row)
    found: dict[str, Finding] = {}
    for (_, group), held in counts.items():
        times = sum(bool(row.flags & COUNTED) for row in held)
        key = held[0].key
        if times == 1 or key in found:
            continue
        if times == 0:
            fix = "a part of a cut parameter says so: `tensor_model_parallel = True`; a copy does not, and only copies on other stages have `shared = True`"
            found[key] = Finding(key, f.NOT_COUNTED, fix, _ranks(group), tuple(row.rank for row in held))
        else:
            fix = "a copy on every tensor rank has `tensor_model_parallel = False`; a copy on another stage has `shared = True`"
            found[key] = Finding(key, f.COUNTED_TWICE, fix, _ranks(group), tuple(row.rank for row in held if row.flags & COUNTED), detail=f"{times} times")
    return list(found.values())


def reported(optimizer: Any) -> list[float]:
    """Rank -> the norm by which its optimizer will clip (collective)."""
    mine = torch.tensor([float(optimizer.get_grad_norm())], dtype=torch.float64, device=device())
    norms = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(norms, mine)
    return [norm.item() for norm in norms]


def compared(reported: Sequence[float], true: float) -> list[Finding]:
    """The norm as each rank's optimizer reported it against the recomputed one; a norm that is not finite is off."""
    off = {rank: norm for rank, norm in enumerate(reported) if not abs(norm - true) <= TOLERANCE * max(true, 1e-12)}
    if not off:
        return []
    worst = max(off.values(), key=lambda norm: abs(norm - true) if norm == norm else math.inf)
    detail = f"the optimizer says {worst:.6g}, the gradients {true:.6g}"
    fix = "see the parameters counted twice or left out; clipping uses this number"
    return [Finding("gradient norm", f.NORM, fix, ranks=tuple(off), difference=abs(worst - true), detail=detail)]


def _ranks(group: tuple[int, ...]) -> str:
    return f"norm of ranks {min(group)}-{max(group)}" if len(group) > 1 else f"norm of rank {min(group)}"

"""Replica comparison: one message of fingerprints, values only of what differs.

Names travel when they change (at the start, and when a parameter appears or vanishes), fingerprints at every comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megalign.parallel.audit.held import Entry, fingerprint
from megalign.parallel.grid import Grid
from megalign.parallel.init import device

MOST_VALUES = 64  # tensors whose values are fetched at a time
# Where more differ, the values of these come first: what a difference began with rather than what followed.
_ORDER = ("weight", "buffer", "gradient", "master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Mismatch:
    """Copies of one tensor that differ. classes: ranks whose bits agree, the class of the lowest rank first."""

    label: str
    kind: str
    key: str
    classes: tuple[tuple[int, ...], ...]
    difference: float = float("nan")  # largest, absolute, to the lowest rank's; nan: not fetched
    scale: float = float("nan")  # largest absolute value there


@dataclass(frozen=True)
class Row:
    """One entry of one rank, as the others know it."""

    rank: int
    label: str
    flags: int
    part: int
    elements: int = 0

    @property
    def kind(self) -> str:
        return self.label.split("|", 1)[0]

    @property
    def key(self) -> str:
        return key_of(self.label)


def key_of(label: str) -> str:
    """kind|name[|cut]|dtype|elements[|start:stop] -> name[|cut]."""
    fields = label.split("|")[1:]
    return "|".join(field for field in fields[:2] if field == fields[0] or field.startswith(("tp", "etp")))


class Comparison:
    """Compares entries over the whole world, remembering the names of all ranks."""

    def __init__(self, grid: Grid):
        self.grid = grid
        self.labels: list[list[tuple[str, int, int]]] = []  # rank -> (label, elements, optimizer)
        self.version = 0
        mine = {name: axis.rank for name, axis in _axes(grid).items()}
        self.coordinates: list[dict[str, int]] = [{}] * grid.world
        dist.all_gather_object(self.coordinates, mine)

    @torch.no_grad()
    def run(self, entries: Sequence[Entry]) -> tuple[list[Mismatch], list[Row]]:
        """What differs between ranks, and all entries of all ranks (collective)."""
        self._exchange_labels(entries)
        longest = max(len(labels) for labels in self.labels)
        table = torch.zeros(longest, 3, dtype=torch.int64, device=device())
        for i, entry in enumerate(entries):
            table[i, 0], table[i, 1] = fingerprint(entry.value)
            table[i, 2] = entry.flags
        tables = [torch.empty_like(table) for _ in range(self.grid.world)]
        dist.all_gather(tables, table)
        values = np.concatenate([found[: len(labels)].cpu().numpy() for found, labels in zip(tables, self.labels, strict=True)])
        different = values[:, :2] != values[self._first[self._ids], :2]
        labels = sorted({self._flat[i][1] for i in np.nonzero(different.any(1))[0]}, key=lambda label: (_ORDER.index(label.split("|")[0]), label))
        rows = [Row(rank, label, int(values[i, 2]), part, elements) for i, (rank, label, elements, part) in enumerate(self._flat)]
        return self._with_values([self._classes(label, values) for label in labels], entries), rows

    def holders(self, label: str) -> list[int]:
        """Ranks that hold it, ascending."""
        return [self._flat[i][0] for i in self._where.get(label, [])]

    def owner(self, label: str) -> tuple[int, int, torch.dtype]:
        """(first rank that holds it, elements, dtype)."""
        rank, _, elements, _ = self._flat[self._where[label][0]]
        name = next(field for field in label.split("|")[2:] if hasattr(torch, field))
        return rank, elements, getattr(torch, name)

    def axes_that_explain(self, classes: Sequence[Sequence[int]]) -> list[str]:
        """Axes whose coordinate alone decides to which class a rank belongs."""
        found = []
        for axis in self.coordinates[0]:
            decided: dict[int, set[int]] = {}
            for number, ranks in enumerate(classes):
                for rank in ranks:
                    decided.setdefault(self.coordinates[rank][axis], set()).add(number)
            if len(decided) > 1 and all(len(numbers) == 1 for numbers in decided.values()):
                found.append(axis)
        return found

    def axes_that_vary(self, ranks: Sequence[int]) -> list[str]:
        """Axes along which these ranks differ."""
        return [axis for axis in self.coordinates[0] if len({self.coordinates[rank][axis] for rank in ranks}) > 1]

    def _exchange_labels(self, entries: Sequence[Entry]) -> None:
        mine = [(entry.label, entry.value.numel(), entry.part) for entry in entries]
        if self.labels:
            same = mine == self.labels[self.grid.rank]
            changed = torch.tensor([float(not same)], device=device())
            dist.all_reduce(changed, op=dist.ReduceOp.MAX)
            if not changed.item():
                return
        self.labels = [[]] * self.grid.world
        dist.all_gather_object(self.labels, mine)
        self.version += 1
        self._flat = [(rank, *entry) for rank, found in enumerate(self.labels) for entry in found]
        self._where: dict[str, list[int]] = {}
        for i, (_, label, _, _) in enumerate(self._flat):
            self._where.setdefault(label, []).append(i)
        number = {label: n for n, label in enumerate(self._where)}
        self._ids = np.array([number[label] for _, label, _, _ in self._flat], dtype=np.int64)
        self._first = np.array([found[0] for found in self._where.values()], dtype=np.int64)

    def _classes(self, label: str, values: np.ndarray) -> Mismatch:
        classes: dict[tuple[int, int], list[int]] = {}
        for i in self._where[label]:
            classes.setdefault((int(values[i, 0]), int(values[i, 1])), []).append(self._flat[i][0])
        return Mismatch(label, label.split("|")[0], key_of(label), tuple(tuple(ranks) for ranks in classes.values()))

    def _with_values(self, mismatches: list[Mismatch], entries: Sequence[Entry]) -> list[Mismatch]:
        """Fetch the first rank's values of each and measure the others against them."""
        local: dict[str, list[torch.Tensor]] = {}
        for entry in entries:
            local.setdefault(entry.label, []).append(entry.value)
        found = []
        for mismatch in mismatches[:MOST_VALUES]:
            first = self._where[mismatch.label][0]
            owner, _, elements, _ = self._flat[first]
            mine = local.get(mismatch.label, [])
            reference = torch.empty(elements, dtype=torch.float64, device=device())
            if self.grid.rank == owner:
                reference.copy_(mine[0].reshape(-1))
            dist.broadcast(reference, src=owner)
            worst = torch.zeros(2, dtype=torch.float64, device=device())
            if mine and elements:
                worst[0] = max((copy.reshape(-1).to(reference) - reference).abs().max() for copy in mine)
                worst[1] = reference.abs().max()
            dist.all_reduce(worst, op=dist.ReduceOp.MAX)
            found.append(Mismatch(mismatch.label, mismatch.kind, mismatch.key, mismatch.classes, *worst.tolist()))
        return found + mismatches[MOST_VALUES:]


def _axes(grid: Grid) -> dict[str, Any]:
    return {
        "tensor": grid.tensor,
        "context": grid.context,
        "data": grid.data,
        "pipeline": grid.pipeline,
        "expert": grid.expert,
        "expert_tensor": grid.expert_tensor,
        "expert_data": grid.expert_data,
    }

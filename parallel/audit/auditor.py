"""The auditor of a run: compares all copies of all parameters at the start and every n steps, before the update.

A difference is reported once, with the step at which it was first seen; `repair` gives every copy the values of the first
rank that holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megalign.parallel.audit import diagnose, norm
from megalign.parallel.audit import findings as f
from megalign.parallel.audit.compare import Comparison, Mismatch, Row
from megalign.parallel.audit.findings import Finding
from megalign.parallel.audit.held import Entry, Held, gradients, states, weights
from megalign.parallel.grid import Grid
from megalign.parallel.init import device
from megalign.parallel.placement import Placement


class Auditor:
    """Compares what the ranks of a grid hold.

    held: what this rank holds now (asked anew each time, so that late parameters are seen). chunks: wrapped in DDP, or not.
    """

    def __init__(
        self,
        grid: Grid,
        held: Callable[[], Sequence[Held]],
        chunks: Sequence[Any],
        optimizer: Any = None,
        placements: Sequence[Placement] = (),
        *,
        interval: int = 100,
        repair: bool = False,
    ):
        self.grid, self.held, self.chunks, self.optimizer = grid, held, chunks, optimizer
        self.placements = {p.name: p for p in placements}
        self.interval, self.repairs = interval, repair
        self.comparison = Comparison(grid)
        self.groups = norm.stats_groups(optimizer) if optimizer is not None else []
        self.first_seen: dict[tuple[str, str], int] = {}
        self.initial: set[str] = set()
        self.repaired: set[tuple[str, str]] = set()  # at the last look
        self.started: int | None = None
        self.last: list[Finding] = []
        self.rows: list[Row] = []

    def due(self, step: int) -> bool:
        """Whether step number `step` (from 1) is looked at: the first of this process, and every `interval`-th."""
        return self.started is None or step == self.started + 1 or step % self.interval == 0

    def start(self, step: int = 0) -> list[Finding]:
        """Compare weights, buffers and optimizer states before the first step (collective)."""
        self.started = step
        held = self.held()
        return self._look([*weights(held, self._buffered()), *states(held, self.optimizer)], step, untouched=True)

    def before_update(self, step: int) -> list[Finding]:
        """Compare everything after the backward pass of `step` and before its update (collective); all its findings."""
        held = self.held()
        entries = [*weights(held, self._buffered()), *states(held, self.optimizer), *gradients(held, self.optimizer)]
        if self.started is None:
            self.started = step - 1
        found = self._look(entries, step, untouched=step == self.started + 1)
        found += self._dated(norm.counting(self.rows, self.groups), step)
        true = norm.recomputed(entries, self.comparison, self.grid.rank)
        found += self._dated(norm.compared(norm.reported(self.optimizer), true), step)
        self.last = found
        return found

    def finish(self, step: int) -> list[Finding]:
        """Compare weights, buffers and optimizer states after the last step (collective); all its findings."""
        for chunk in self.chunks:
            if getattr(chunk, "use_forward_hook", False):  # overlap_param_gather: the new weights are under way until the next forward
                chunk.start_param_sync(force_sync=True)
        held = self.held()
        return self._look([*weights(held, self._buffered()), *states(held, self.optimizer)], step)

    def new(self, found: Sequence[Finding], step: int) -> list[Finding]:
        """Those that were first seen at this step."""
        return [finding for finding in found if self.first_seen[finding.parameter, finding.cause] == step]

    def summary(self) -> str:
        """`142 parameters, 7 groups, 0 drift`: logical parameters, distinct sets of ranks that hold copies, parameters with findings."""
        holders: dict[str, set[int]] = {}
        for row in self.rows:
            if row.kind == "weight":
                holders.setdefault(row.key, set()).add(row.rank)
        parameters = {key.split("|")[0] for key in holders}
        groups = {tuple(sorted(ranks)) for ranks in holders.values() if len(ranks) > 1}
        return f"{len(parameters)} parameters, {len(groups)} groups, {len({finding.parameter for finding in self.last})} drift"

    def _look(self, entries: list[Entry], step: int, *, untouched: bool = False) -> list[Finding]:
        """untouched: no update has been made yet."""
        for finding in self.repaired:  # what comes back after a repair is told again
            self.first_seen.pop(finding, None)
        mismatches, self.rows = self.comparison.run(entries)
        if untouched:
            self.initial |= {mismatch.key for mismatch in mismatches if mismatch.kind == "weight"}
        found = diagnose.structure(self.rows, self.comparison, trained=self.optimizer is not None)
        found += diagnose.differences(mismatches, self.rows, self.comparison, self.placements, step=step, initial=self.initial)
        if self.repairs and mismatches:
            self._repair(mismatches, entries)
            self.initial.clear()
        self.last = self._dated(found, step)
        self.repaired = {(finding.parameter, finding.cause) for finding in self.last if self.repairs and finding.cause in f.REPAIRABLE}
        return self.last

    def _dated(self, found: Sequence[Finding], step: int) -> list[Finding]:
        dated = []
        for finding in found:
            first = (self.started or 0) if finding.cause == f.INITIALISATION else self.first_seen.get((finding.parameter, finding.cause), step)
            self.first_seen.setdefault((finding.parameter, finding.cause), step)
            dated.append(Finding(**{**vars(finding), "first_step": first}))
        return dated

    @torch.no_grad()
    def _repair(self, mismatches: Sequence[Mismatch], entries: Sequence[Entry]) -> None:
        """Give every copy the bits of the first rank that holds it."""
        local: dict[str, list[torch.Tensor]] = {}
        for entry in entries:
            local.setdefault(entry.label, []).append(entry.value)
        for mismatch in mismatches:
            owner, elements, dtype = self.comparison.owner(mismatch.label)
            mine = local.get(mismatch.label, [])
            values = torch.empty(elements, dtype=dtype, device=device())
            if self.grid.rank == owner:
                values.copy_(mine[0].reshape(-1))
            dist.broadcast(values, src=owner)
            for copy in mine:
                copy.copy_(values.view_as(copy))

    def _buffered(self) -> set[int]:
        """Ids of parameters that DDP has a gradient buffer for."""
        return {id(p) for chunk in self.chunks for p in getattr(chunk, "param_to_bucket_group", {})}

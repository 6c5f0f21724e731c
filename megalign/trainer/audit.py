"""The auditor inside a run: when it looks, and what follows from what it finds (the recipe's `audit`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megalign.models.held import held_by
from megalign.parallel.audit.auditor import Auditor
from megalign.parallel.audit.findings import Finding
from megalign.parallel.placement import summary
from megalign.trainer.guard import TrainingStopped
from megalign.trainer.metrics import NullLogger

if TYPE_CHECKING:
    from megalign.trainer.engine import Engine


class RunAudit:
    """Warns, stops or repairs. With `audit.interval: null` it compares nothing.

    Messages wait in `messages` for whoever keeps the record, and stay in `history`; they are the same on every rank.
    """

    def __init__(self, engine: Engine):
        self.engine, self.config = engine, engine.recipe.audit
        self.messages: list[str] = []
        self.history: list[str] = []
        self.auditor: Auditor | None = None
        if self.config.interval is not None:
            self.auditor = Auditor(
                engine.grid,
                lambda: held_by(engine.models, engine.grid),
                engine.chunks,
                engine.optimizer,
                engine.placements,
                interval=self.config.interval,
                repair=self.config.on_failure == "repair",
            )

    def start(self, step: int, log: NullLogger) -> None:
        """Say who reduces what; compare what the run starts with, at `step`, and probe if the recipe says so (collective)."""
        log.event(step, "placement", summary(self.engine.placements))
        if self.config.probe:
            from megalign.trainer.probing import probe_engine

            self._tell(probe_engine(self.engine, self.engine.models[0].real_vocab_size), step)
        if self.auditor is not None:
            self._act(self.auditor.start(step), step)
        self.report(step, log)

    def before_update(self, step: int) -> None:
        """Compare after the backward pass of `step`, if it is due (collective). Raises TrainingStopped with on_failure: stop."""
        if self.auditor is not None and self.auditor.due(step):
            self._act(self.auditor.before_update(step), step)

    def report(self, step: int, log: NullLogger) -> None:
        """Put messages on record."""
        for message in self.take_messages():
            log.event(step, "audit", message)

    def close(self, step: int, log: NullLogger) -> None:
        """Compare once more what the run ends with (collective), and say the result in a line."""
        if self.auditor is not None:
            self._act(self.auditor.finish(step), step)
            self.report(step, log)
            log.event(step, "audit", self.auditor.summary())

    def take_messages(self) -> list[str]:
        """Messages since the last call."""
        taken, self.messages = self.messages, []
        return taken

    def summary(self) -> str:
        """`142 parameters, 7 groups, 0 drift`, of the last comparison; empty before the first."""
        return "" if self.auditor is None or not self.auditor.rows else self.auditor.summary()

    def _act(self, found: Sequence[Finding], step: int) -> None:
        assert self.auditor is not None
        self._tell(self.auditor.new(found, step), step)

    def _tell(self, new: Sequence[Finding], step: int) -> None:
        if not new:
            return
        if self.config.on_failure == "stop":
            text = "\n".join(finding.text() for finding in new)
            raise TrainingStopped(f"the audit found {len(new)} parameter{'s' * (len(new) > 1)}:\n{text}", step, parameter=new[0].parameter)
        lines = [finding.text() + self._done(finding) for finding in new]
        self.messages += lines
        self.history += lines

    def _done(self, finding: Finding) -> str:
        if self.auditor is None or (finding.parameter, finding.cause) not in self.auditor.repaired:
            return ""
        return "\n    repaired: every copy has the values of the first rank that holds it"

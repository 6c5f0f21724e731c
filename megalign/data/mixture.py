"""Several sources, each with its share of the tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

from megalign.config.schema import CurriculumStage
from megalign.data.dataset import PackRange
from megalign.data.rows import DataError
from megalign.data.sampler import Sampler, shuffled


class MixtureSampler(Sampler):
    """Deals the rows of several sources so that each has its weight's share of the tokens at every moment.

    Nothing is drawn at random but the order within a source: a row of t tokens earns every source w t tokens of
    credit and costs its own t, and the next row is of the source with the most credit. So the shares are those asked
    for to within about a row of each source, after any number of rows. A source that is through begins again in
    another order; an epoch is as many rows as all sources have. `curriculum` gives other weights from some steps on.
    """

    def __init__(self, parts: list[PackRange], tokens: np.ndarray, *, curriculum: list[CurriculumStage] | None = None, **options: Any):
        self.parts = parts
        self.stages = [(0, np.array([part.weight for part in parts]))]
        for stage in curriculum or []:
            weights = np.array([stage.weights.get(part.name, 0.0) for part in parts])
            self.stages.append((stage.from_step, weights / weights.sum()))
        self.step = 0
        self.credit = np.zeros(len(parts))
        self.dealt = [0] * len(parts)  # tokens of each source
        self.places = [[0, 0] for _ in parts]  # epoch of each source, and rows of it already dealt
        self._orders: dict[int, tuple[int, np.ndarray]] = {}
        super().__init__(len(tokens), tokens=tokens, **options)
        empty = [part.name for i, part in enumerate(parts) if part.start == part.stop and any(w[i] for _, w in self.stages)]
        if empty:
            raise DataError(f"data.curriculum: nothing of {empty[0]!r} can be trained on; correct its file, or give it weight 0")

    @property
    def weights(self) -> np.ndarray:
        """Shares of the next step."""
        return [weights for start, weights in self.stages if start <= self.step][-1]

    def _take(self) -> np.ndarray:
        if self.offset >= self.num_rows or (self.remainder == "drop" and self.num_rows - self.offset < self.global_batch_size):
            self.epoch, self.offset = self.epoch + 1, 0
        weights = self.weights
        rows = [self._next_row(weights) for _ in range(self.global_batch_size)]
        self.step += 1
        self.offset = min(self.offset + len(rows), self.num_rows)
        return np.array(rows)

    def _next_row(self, weights: np.ndarray) -> int:
        assert self.tokens is not None
        # Rounded, so that sums that differ in their last bit are equal and the larger weight goes first.
        source = max(range(len(weights)), key=lambda i: (weights[i] > 0, round(self.credit[i], 6), weights[i], -i))
        epoch, offset = self.places[source]
        part = self.parts[source]
        if offset == part.stop - part.start:
            epoch, offset = epoch + 1, 0
        self.places[source] = [epoch, offset + 1]
        row = part.start + int(self._source_order(source, epoch)[offset])
        tokens = int(self.tokens[row])
        self.credit += weights * tokens
        self.credit[source] -= tokens
        self.dealt[source] += tokens
        return row

    def _source_order(self, source: int, epoch: int) -> np.ndarray:
        known = self._orders.get(source)
        if known is None or known[0] != epoch:
            count = self.parts[source].stop - self.parts[source].start
            shuffle = self.shuffle and not (self.keep_first_epoch and epoch == 0)
            order = shuffled(count, self.seed, epoch, source) if shuffle else np.arange(count)
            self._orders[source] = known = (epoch, order)
        return known[1]

    def realised(self) -> dict[str, dict[str, float]]:
        """Of each source its share of the tokens dealt so far, and how many times it was gone through."""
        total = max(1, sum(self.dealt))
        return {
            part.name: {
                "share": self.dealt[i] / total,
                "passes": self.places[i][0] + self.places[i][1] / max(1, part.stop - part.start),
            }
            for i, part in enumerate(self.parts)
        }

    def describe(self) -> str:
        """`realised` in one line, beside the weights of the last step."""
        last = [weights for start, weights in self.stages if start <= max(0, self.step - 1)][-1]
        found = self.realised()
        return "; ".join(
            f"{part.name} {found[part.name]['share']:.2%} of the tokens (weight {last[i]:.2%}), {found[part.name]['passes']:.2f} passes"
            for i, part in enumerate(self.parts)
        )

    def state_dict(self) -> dict[str, Any]:
        place = {"step": self.step, "credit": self.credit.tolist(), "dealt": list(self.dealt), "places": [list(p) for p in self.places]}
        return {**super().state_dict(), **place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.step, self.credit = state["step"], np.array(state["credit"])
        self.dealt, self.places = list(state["dealt"]), [list(place) for place in state["places"]]

    def _order_state(self) -> dict[str, Any]:
        """Names and rows, not weights: those may be changed when a run is continued."""
        return {**super()._order_state(), "mixture": [[part.name, part.start, part.stop] for part in self.parts]}

"""Deals a stream: every row once an epoch, shuffled within its window."""

from __future__ import annotations

from typing import Any

import numpy as np

from megalign.data.rows import DataError
from megalign.data.sampler import Sampler, shuffled
from megalign.data.stream import PLACE, Stream


class StreamSampler(Sampler):
    """Like `Sampler`, without knowing how many rows there are.

    Windows come in the order of the files, and a row moves within its window only; its place there follows from
    (seed, epoch, window) alone. So the place in the data is three numbers, and going on from it reads one window.
    """

    def __init__(self, stream: Stream, **options: Any):
        self.stream = stream
        self.window = 0
        self.windows: int | None = None  # known once the last was seen
        super().__init__(max(1, len(stream)), tokens=np.zeros(0), **{**options, "remainder": "pad"})
        self.remainder = options.get("remainder", "pad")

    @property
    def steps_per_epoch(self) -> int:
        """Of the first window."""
        return max(1, len(self.stream) // self.global_batch_size)

    @property
    def progress(self) -> float:
        """Epochs gone through; while the number of windows is unknown, whole ones only."""
        if self.windows is None:
            return float(self.epoch)
        return self.epoch + (self.window + self.offset / max(1, len(self.stream.window(self.window).packs))) / self.windows

    def _take(self) -> np.ndarray:
        rows: list[int] = []
        opened = False  # whether this step began an epoch: a whole one must fill it
        while len(rows) < self.global_batch_size:
            window = self.stream.window(self.window)
            count = len(window.packs)
            if window.last:
                self.windows = self.window + 1
            if self.offset < count:
                order = self._window_order(count)
                taken = order[self.offset : self.offset + self.global_batch_size - len(rows)]
                rows += (self.window * PLACE + taken).tolist()
                self.offset += len(taken)
            elif not window.last:
                self.window, self.offset = self.window + 1, 0
            elif rows and self.remainder == "pad":
                break
            else:  # the remainder is dropped, or there is none
                if opened:
                    size = self.global_batch_size
                    raise DataError(f"{self.stream.source.name}: an epoch makes no batch of {size} rows; lower train.global_batch_size, or add data")
                rows, opened = [], True
                self.epoch, self.window, self.offset = self.epoch + 1, 0, 0
        return np.array(rows)

    def _window_order(self, count: int) -> np.ndarray:
        return shuffled(count, self.seed, self.epoch, self.window) if self.shuffle else np.arange(count)

    def tokens_of(self, batch: np.ndarray) -> np.ndarray:
        return self.stream.tokens(batch)

    def restart(self) -> None:
        super().restart()
        self.window = 0

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "window": self.window, "windows": self.windows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.window, self.windows = state["window"], state["windows"]

    def _order_state(self) -> dict[str, Any]:
        return {"seed": self.seed, "shuffle": self.shuffle, "stream": self.stream.fingerprint}

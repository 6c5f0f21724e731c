"""Which rows the next step trains on: the same for every layout, and after every resume."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from megalign.data.rows import DataError


class Sampler:
    """Deals the rows of a dataset to the data-parallel ranks, a global batch at a time.

    Each epoch is one pass in an order of its own, a function of (seed, epoch) alone. The global batch is cut
    microbatch by microbatch, rank by rank: microbatch i of rank r is rows [(i D + r) m, (i D + r + 1) m) of
    it (D ranks, microbatches of m rows), so its rows do not depend on D. The remainder of an epoch that fills
    no global batch is dropped, or trained with the batch padded: a padding row is -1 and scores nothing. No
    batch mixes two epochs.
    """

    def __init__(
        self,
        num_rows: int,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        remainder: Literal["drop", "pad"] = "pad",
    ):
        """Raises DataError for sizes that do not divide, and where an epoch would have no step."""
        rows_at_once = micro_batch_size * data_parallel_size
        if global_batch_size % rows_at_once:
            raise DataError(
                f"train.global_batch_size is {global_batch_size}, not a multiple of micro_batch_size"
                f"({micro_batch_size}) * data_parallel_size({data_parallel_size}) = {rows_at_once}"
            )
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise DataError(
                f"data_parallel_rank is {data_parallel_rank}, outside 0..{data_parallel_size - 1}"
            )
        self.num_rows = num_rows
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.data_parallel_rank, self.data_parallel_size = data_parallel_rank, data_parallel_size
        self.seed, self.shuffle, self.remainder = seed, shuffle, remainder
        self.epoch = 0  # of the latest step; the next step may open another
        self.offset = 0  # rows of this epoch already dealt, over all ranks
        self._order_of: tuple[int, np.ndarray] | None = None
        if self.steps_per_epoch < 1:
            raise DataError(
                f"{num_rows} rows make no batch of {global_batch_size} with data.remainder {remainder!r}; "
                "lower train.global_batch_size, add data, or set data.remainder to pad"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Steps of a whole epoch, the padded one included."""
        whole, rest = divmod(self.num_rows, self.global_batch_size)
        return whole + (rest > 0 and self.remainder == "pad")

    def next_step(self) -> list[list[int]]:
        """Row indices of each microbatch of this rank, -1 for padding; moves on to the next step."""
        left = self.num_rows - self.offset
        # Asked here and not after a step: what is saved at the end of an epoch opens the next one on resume.
        if left <= 0 or (self.remainder == "drop" and left < self.global_batch_size):
            self.epoch, self.offset = self.epoch + 1, 0
        rows = self._order(self.epoch)[self.offset : self.offset + self.global_batch_size]
        self.offset += len(rows)
        batch = np.full(self.global_batch_size, -1)
        batch[: len(rows)] = rows
        by_rank = batch.reshape(-1, self.data_parallel_size, self.micro_batch_size)
        return by_rank[:, self.data_parallel_rank].tolist()

    def state_dict(self) -> dict[str, Any]:
        """The place in the data, in rows over all ranks: equal on every rank, valid for every layout."""
        return {"epoch": self.epoch, "offset": self.offset, **self._order_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue there. DataError if the rows or their order are not those of the saved run."""
        for key, value in self._order_state().items():
            if state[key] != value:
                raise DataError(
                    f"cannot resume: {key} is {value!r}, but {state[key]!r} in the checkpoint, so its "
                    "data position means other rows; restore the data, tokenizer and seed of that run, or start a new one"
                )
        self.epoch, self.offset = state["epoch"], state["offset"]

    def _order_state(self) -> dict[str, Any]:
        return {"num_rows": self.num_rows, "seed": self.seed, "shuffle": self.shuffle}

    def _order(self, epoch: int) -> np.ndarray:
        if self._order_of is None or self._order_of[0] != epoch:
            rows = np.arange(self.num_rows)
            if self.shuffle:
                # Not default_rng: only RandomState's stream is promised never to change with a numpy upgrade.
                np.random.RandomState([self.seed % 2**32, epoch]).shuffle(rows)
            self._order_of = (epoch, rows)
        return self._order_of[1]

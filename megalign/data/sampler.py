"""Which rows the next step trains on: the same for every layout, and after every resume."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from megalign.data.balance import even_order
from megalign.data.rows import DataError


class Sampler:
    """Deals the rows of a dataset to the data-parallel ranks, a global batch at a time.

    Each epoch is one pass in an order of its own, a function of (seed, epoch) alone. The global batch is cut
    microbatch by microbatch, rank by rank: microbatch i of rank r is rows [(i D + r) m, (i D + r + 1) m) of
    it (D ranks, microbatches of m rows), so its rows do not depend on D. The remainder of an epoch that fills
    no global batch is dropped, or trained with the batch padded: a padding row is -1 and scores nothing. No
    batch mixes two epochs.

    With `balance` the microbatches of a global batch are made of other rows of it, so that they hold equally many
    tokens, and dealt so that the ranks do: see `balance`. What a microbatch holds still does not depend on D.
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
        tokens: np.ndarray | None = None,
        balance: bool = False,
        keep_first_epoch: bool = False,
    ):
        """tokens: [num_rows] of each row. keep_first_epoch: it is in the order of the rows, the
        later ones are shuffled. Raises DataError for sizes that do not divide, and where an epoch would have no step."""
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
        self.tokens, self.balance, self.keep_first_epoch = tokens, balance, keep_first_epoch
        self.epoch = 0  # of the latest step; the next step may open another
        self.offset = 0  # rows of this epoch already dealt, over all ranks
        self._order_of: tuple[int, np.ndarray] | None = None
        if balance and tokens is None:
            raise ValueError("balance needs the tokens of each row")
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
        return self.next_global_step()[:, self.data_parallel_rank].tolist()

    def next_global_step(self) -> np.ndarray:
        """[microbatches, ranks, rows] row indices of the next step on every rank; moves on to it."""
        rows = self._take()
        batch = np.full(self.global_batch_size, -1)
        batch[: len(rows)] = rows
        if self.balance:
            batch = batch[even_order(self.tokens_of(batch), self.micro_batch_size, self.data_parallel_size)]
        return batch.reshape(-1, self.data_parallel_size, self.micro_batch_size)

    def tokens_of(self, batch: np.ndarray) -> np.ndarray:
        """Tokens of each row, 0 of padding."""
        assert self.tokens is not None
        return np.where(batch < 0, 0, self.tokens[batch])

    @property
    def progress(self) -> float:
        """Epochs gone through."""
        return self.epoch + self.offset / max(1, self.num_rows)

    def _take(self) -> np.ndarray:
        """The rows of the next global batch, without padding."""
        left = self.num_rows - self.offset
        # Asked here and not after a step: what is saved at the end of an epoch opens the next one on resume.
        if left <= 0 or (self.remainder == "drop" and left < self.global_batch_size):
            self.epoch, self.offset = self.epoch + 1, 0
        rows = self._order(self.epoch)[self.offset : self.offset + self.global_batch_size]
        self.offset += len(rows)
        return rows

    def restart(self) -> None:
        """Back to the first row of the first epoch."""
        self.epoch = self.offset = 0

    def state_dict(self) -> dict[str, Any]:
        """The place in the data, in rows over all ranks: equal on every rank, valid for every layout."""
        return {"epoch": self.epoch, "offset": self.offset, **self._order_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue there. DataError if the rows or their order are not those of the saved run."""
        for key, value in self._order_state().items():
            if state.get(key) != value:
                raise DataError(
                    f"cannot resume: {key} is {value!r}, but {state.get(key)!r} in the checkpoint, so its "
                    "data position means other rows; restore the data, tokenizer and seed of that run, or start a new one"
                )
        self.epoch, self.offset = state["epoch"], state["offset"]

    def _order_state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"num_rows": self.num_rows, "seed": self.seed, "shuffle": self.shuffle}
        return {**state, "keep_first_epoch": True} if self.keep_first_epoch else state

    def _order(self, epoch: int) -> np.ndarray:
        if self._order_of is None or self._order_of[0] != epoch:
            shuffle = self.shuffle and not (self.keep_first_epoch and epoch == 0)
            self._order_of = (epoch, shuffled(self.num_rows, self.seed, epoch) if shuffle else np.arange(self.num_rows))
        return self._order_of[1]


def shuffled(count: int, *seed: int) -> np.ndarray:
    """0 to count - 1 in an order that follows from the seed numbers alone, in every version of numpy."""
    order = np.arange(count)
    # Not default_rng: only RandomState's stream is promised never to change with a numpy upgrade.
    np.random.RandomState([number % 2**32 for number in seed]).shuffle(order)
    return order

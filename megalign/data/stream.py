"""Rows tokenised while training: a window of them at a time, each window once, by one process.

The rows of all files, in their order, are cut in windows of `data.shuffle_window`. A window is an entry of the cache
like any other: whichever rank asks first makes it, the others map it, and the next one is made by a thread while the
present one trains. So the first step waits for one window only, memory holds one, and a later epoch, a resumed run
or another run finds the windows made. Packs never reach over the edge of a window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from megalign.config.schema import Recipe
from megalign.data.cache import Encoded, announcer, encode_key, entry_key, write_encoded
from megalign.data.once import build_once
from megalign.data.packs import Packs, write_packs
from megalign.data.rows import Example, Row
from megalign.data.source import Source, open_source
from megalign.data.splits import Piece, check_bad, look_at
from megalign.data.tokenizer import Tokenizer

PLACE = 2**32  # a row's number: window * PLACE + its pack in the window
WINDOWS_OPEN = 3  # a step may reach over an edge


@dataclass
class Window:
    """One window, opened."""

    piece: Piece
    packs: Packs
    last: bool  # no row follows


def open_stream(recipe: Recipe) -> Source:
    """All files of data.train as one source."""
    data, names = recipe.data, recipe.data.train
    names = [names] if isinstance(names, str) else names
    sources = [open_source(name, data, data.max_rows, recipe.train.seed, held_out=False) for name in names]
    return Source(
        ", ".join(source.name for source in sources),
        ", ".join(dict.fromkeys(source.format for source in sources)),
        lambda: islice(chain.from_iterable(source.rows() for source in sources), data.max_rows),
        lambda folder: " ".join(source.digest(folder) for source in sources),
    )


class Stream(Sequence[list[Example]]):
    """The packs of all windows, by number. Its length is that of the first window: nobody knows the others yet."""

    def __init__(self, source: Source, recipe: Recipe, tokenizer: Tokenizer, folder: Path, grain: int):
        self.source, self.data, self.tokenizer, self.folder, self.grain = source, recipe.data, tokenizer, folder, grain
        self.size = recipe.data.shuffle_window
        self._key: dict[str, Any] = {
            **encode_key(source, tokenizer, recipe.data, folder),
            "window": [self.size, recipe.data.packing, grain, recipe.data.max_rows],
        }
        self.fingerprint = entry_key("stream", **self._key)
        self._open: dict[int, Window] = {}
        self._reader: tuple[int, Iterator[Row]] = (0, iter(()))  # rows behind it, rows to come
        self._thread = ThreadPoolExecutor(1, "next window")  # all reading happens there
        self._made: dict[int, Future[Path]] = {}

    def __len__(self) -> int:
        return len(self.window(0).packs)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        window, pack = divmod(number, PLACE)
        return self.window(window).packs[pack]

    def tokens(self, numbers: np.ndarray) -> np.ndarray:
        """Tokens of each row; 0 where the number is -1."""
        found = [0 if n < 0 else self.window(n // PLACE).packs.tokens[n % PLACE] for n in numbers.ravel().tolist()]
        return np.array(found, np.int64).reshape(numbers.shape)

    def window(self, number: int) -> Window:
        """A window, made if need be. DataError where more of its rows are bad than `data.max_bad_share` allows."""
        if number not in self._open:
            self._open[number] = self._load(number)
            while len(self._open) > WINDOWS_OPEN:
                del self._open[next(iter(self._open))]
            if not self._open[number].last:
                self._ask(number + 1)
        return self._open[number]

    def _load(self, number: int) -> Window:
        folder = self._ask(number).result()
        del self._made[number]
        encoded = Encoded(folder / "rows")
        piece = self._piece(number, encoded)
        check_bad([piece], self.data)
        return Window(piece, Packs(folder / "packs", [encoded]), last=len(encoded) < self.size)

    def _ask(self, number: int) -> Future[Path]:
        if number not in self._made:
            self._made[number] = self._thread.submit(self._make, number)
        return self._made[number]

    def _make(self, number: int) -> Path:
        key = entry_key("window", number=number, **self._key)
        return build_once(self.folder, key, lambda part: self._write(part, number), say=announcer(), timeout=self.data.cache_timeout)

    def _write(self, part: Path, number: int) -> None:
        for name in ("rows", "packs"):
            (part / name).mkdir()
        write_encoded(part / "rows", self._rows(number), self.tokenizer, self.data, self.source.name)
        piece = self._piece(number, Encoded(part / "rows"))
        write_packs(part / "packs", [piece], self.data, self.grain)

    def _rows(self, number: int) -> Iterator[Row]:
        """The rows of a window; those before it that another process tokenised are read past."""
        (behind, rows), self._reader = self._reader, (0, iter(()))
        start = number * self.size
        if behind > start or behind == 0:
            behind, rows = 0, self.source.rows()
        for _ in islice(rows, start - behind):
            pass
        yield from islice(rows, self.size)
        self._reader = (start + self.size, rows)  # only if all of them were taken

    def _piece(self, number: int, encoded: Encoded) -> Piece:
        start = number * self.size
        source = Source(
            self.source.name, self.source.format, lambda: islice(self.source.rows(), start, start + self.size), self.source.digest
        )
        return Piece(source, look_at(encoded), 0, len(encoded))

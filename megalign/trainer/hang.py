"""The hang watch of a training run (`train.hang_timeout_seconds`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from megalign.parallel.watch import Watch
from megalign.trainer.engine import Engine


@contextlib.contextmanager
def hang_watch(folder: Path, engine: Engine) -> Iterator[None]:
    """Watch all ranks while inside (collective); nothing if the recipe asks for none.

    Ranks that stop answering are found all the time, those that make no progress from the first step to the last.
    """
    timeout = engine.recipe.train.hang_timeout_seconds
    if timeout is None:
        yield
        return
    watch = Watch(folder, engine.grid, timeout, engine.phases.position)
    watch.start()
    try:
        yield
    finally:
        watch.close()

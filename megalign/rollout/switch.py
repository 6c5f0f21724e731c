"""A training model lent to generation: what must be off meanwhile, and put back whatever happens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any


class _Alone:
    """Stands for a process group of one rank."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


# Read by megatron-core at every forward. Sequence parallelism would cut a step's one position over ranks.
_OFF_ON_MODULES = ("training", "sequence_parallel", "reduce_scatter_embeddings")
_ON_CONFIG = {
    "sequence_parallel": False,
    # With a capacity an answer would depend on its neighbours in the batch.
    "moe_expert_capacity_factor": None,
    # router.py:520 adds it in eval mode too.
    "moe_input_jitter_eps": None,
}
# Every rank of a context-parallel group holds the whole sequence: attention.py's, and the rotary embedding's.
_GROUPS = ("context_group", "cp_group")


@contextlib.contextmanager
def generating(chunks: Sequence[Any]) -> Iterator[None]:
    """Eval mode, without sequence and context parallelism, expert capacity and router noise, for a block."""
    with contextlib.ExitStack() as undo:

        def put(owner: Any, name: str, value: Any) -> None:
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)

        for chunk in chunks:
            for module in chunk.modules():
                for name in _OFF_ON_MODULES:
                    if getattr(module, name, False) is True:
                        put(module, name, False)
                for name in _GROUPS:
                    if getattr(module, name, None) is not None:
                        put(module, name, _Alone())
                # Shared experts hold a copy of the configuration.
                config = getattr(module, "config", None)
                for name, value in _ON_CONFIG.items() if config is not None else ():
                    if getattr(config, name) != value:
                        put(config, name, value)
        yield

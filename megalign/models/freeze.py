"""Parameters that keep their values: chosen by global name, alike on every layout."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch.distributed as dist

from megalign.config.errors import ConfigError, Problem
from megalign.models.weights import named_parameters
from megalign.parallel.grid import Grid


def freeze(chunks: Sequence[Any], grid: Grid, patterns: Sequence[str]) -> int:
    """Switch off the gradient of every parameter that a pattern matches; return this rank's frozen elements (collective).

    A pattern is a glob over the whole global name (`decoder.layers.[0-3].*`), or a dotted part of it: `router`,
    `embedding`, `decoder.layers.3`. A tied output layer is frozen with its embedding. Call it before DDP is made.
    Raises ConfigError for a pattern that matches nothing on any rank, and where a pipeline stage would be left
    with nothing to train: its backward pass would have no end.
    """
    if not patterns:
        return 0
    tied = any(chunk.share_embeddings_and_output_weights for chunk in chunks)
    frozen, trained, used = 0, 0, set()
    for name, parameter, _ in named_parameters(chunks, grid):
        if tied and name == "output_layer.weight":
            name = "embedding.word_embeddings.weight"
        hits = {pattern for pattern in patterns if matches(name, pattern)}
        used |= hits
        if hits:
            parameter.requires_grad_(False)
            frozen += parameter.numel()
        else:
            trained += parameter.numel()
    everywhere: list[Any] = [None] * grid.world
    dist.all_gather_object(everywhere, (used, trained))
    problems = [
        Problem("train.freeze", "no parameter has such a name", "a glob over names like decoder.layers.0.mlp.router.weight, or a dotted part: router", pattern)
        for pattern in patterns
        if not any(pattern in seen for seen, _ in everywhere)
    ]
    idle = [rank for rank, (_, count) in enumerate(everywhere) if count == 0]
    if idle and not problems:
        rule = f"leaves rank {idle[0]} of {grid.world} with no parameter to train, and its pipeline stage with no gradient"
        problems.append(Problem("train.freeze", rule, "freeze less, or use fewer pipeline stages", list(patterns)))
    if problems:
        raise ConfigError(problems)
    return frozen


def matches(name: str, pattern: str) -> bool:
    """True if `pattern` is a glob for the whole of `name`, or one or more of its dotted parts in a row."""
    return fnmatchcase(name, pattern) or f".{pattern}." in f".{name}."

"""The recipe's choice among the backends of FP8 operations, in force in this process."""

from __future__ import annotations

import torch

from megalign.config.errors import ConfigError, Problem
from megalign.config.schema import Recipe
from megalign.kernels import backends


def use_backends(recipe: Recipe) -> None:
    """Have every FP8 operation take `kernels.fp8_backend`; auto: MEGALIGN_FP8_BACKEND, or the fastest of each shape.

    Raises ConfigError if this machine lacks the backend.
    """
    backends.use(recipe.kernels.fp8_backend)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    forced = backends.forced()
    reason = None if forced is None else backends.why_not(forced, device)
    if reason is not None:
        key = "kernels.fp8_backend" if recipe.kernels.fp8_backend != "auto" else "MEGALIGN_FP8_BACKEND"
        here = [backend for backend in ("auto", *backends.LADDER) if backend == "auto" or backends.why_not(backend, device) is None]
        raise ConfigError([Problem(key, f"this machine has no {forced} backend: {reason}", f"set it to {' or '.join(here)}", forced)])

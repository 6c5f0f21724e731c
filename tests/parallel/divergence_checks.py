"""Divergences of two output layers cut over tensor ranks, inside ranks that a fork server started."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

N, D, E, V, REAL, K = 29, 16, 12, 24, 21, 5  # three padding rows


def inputs() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(5)
    return torch.randn(N, D) * 2, torch.randn(V, D), torch.randn(N, E) * 2, torch.randn(V, E), torch.rand(N)


def divergences() -> dict[str, Any]:
    from megalign.losses.distill import forward_kl, jensen_shannon, reverse_kl

    return {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jensen_shannon": partial(jensen_shannon, beta=0.3)}


def wrong(module: Any) -> dict[str, Any]:
    """One thing at a time that must be seen."""
    from unittest import mock

    from megalign.parallel import vocab_softmax

    sound = module.shard_logprobs

    def warm_student_alone(hidden: Any, weight: Any, group: Any, vocab_size: int, temperature: float) -> Any:
        return sound(hidden, weight, group, vocab_size, temperature if torch.is_grad_enabled() else 1.0)

    def next_token(hidden: Any, weight: Any, group: Any, vocab_size: int, temperature: float) -> Any:
        return sound(hidden if torch.is_grad_enabled() else hidden.roll(1, 0), weight, group, vocab_size, temperature)

    def whole_table(hidden: Any, weight: Any, group: Any, vocab_size: int, temperature: float) -> Any:
        return sound(hidden, weight, group, V, temperature)

    def own_part_alone(ctx: Any, grad: Any) -> Any:
        return grad - ctx.saved_tensors[0].exp() * grad.sum(-1, keepdim=True), None

    return {
        "temperature of the student alone": mock.patch.object(module, "shard_logprobs", warm_student_alone),
        "teacher shifted by one token": mock.patch.object(module, "shard_logprobs", next_token),
        "padding rows of the table count": mock.patch.object(module, "shard_logprobs", whole_table),
        "parts of the vocabulary not added": mock.patch.object(module, "sum_of_shards", lambda partial, group: partial),
        "gradient of the own part alone": mock.patch.object(vocab_softmax._LogSoftmax, "backward", staticmethod(own_part_alone)),
    }


def mistaken(patch: Any, mine: torch.Tensor, taught: torch.Tensor, group: Any, temperature: float) -> float:
    """How far value and gradient are from the sound ones, in units of the larger."""
    import contextlib

    from megalign.models import divergence as module

    found = []
    for context in (contextlib.nullcontext(), patch):
        hidden, _, teacher, _, upstream = inputs()
        h, w = hidden.requires_grad_(), mine.clone().requires_grad_()
        with context:
            values = module.divergence(h, w, teacher, taught, group, REAL, divergences()["forward_kl"], temperature=temperature)
            (values * upstream).sum().backward()
        assert w.grad is not None
        found.append((values.detach(), w.grad))
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(*found))


def check(temperature: float) -> dict[str, Any]:
    """This rank's values and gradients with chunks that do not divide N, and the largest tensor kept for backward."""
    import torch.distributed as dist

    from megalign.models import divergence as module
    from megalign.parallel.grid import create_grid

    grid = create_grid(tensor_model_parallel_size=dist.get_world_size())
    hidden, weight, teacher, teacher_weight, upstream = inputs()
    mine, taught = (w.chunk(grid.tensor.size)[grid.tensor.rank].clone() for w in (weight, teacher_weight))
    module.CHUNK_LOGITS = 8 * len(mine)
    logprobs, ids = module.top_k_of(teacher, taught, grid.tensor.group, REAL, K, temperature=temperature)
    results: dict[str, Any] = {"top": (ids, logprobs)}
    for name in (*divergences(), "top_k"):
        h, w = hidden.clone().requires_grad_(), mine.clone().requires_grad_()
        sizes: list[int] = []

        def keep(x: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            if name == "top_k":
                found = module.top_k_divergence(h, w, ids, logprobs, grid.tensor.group, REAL, temperature=temperature)
            else:
                found = module.divergence(h, w, teacher, taught, grid.tensor.group, REAL, divergences()[name], temperature=temperature)
        (found * upstream).sum().backward()
        results[name] = {"values": found.detach(), "hidden": h.grad, "weight": w.grad, "kept": max(sizes, default=0)}
    results["mistakes"] = {name: mistaken(patch, mine, taught, grid.tensor.group, temperature) for name, patch in wrong(module).items()}
    same = module.divergence(hidden, mine, hidden, mine, grid.tensor.group, REAL, divergences()["reverse_kl"], temperature=temperature)
    empty = hidden[:0].clone().requires_grad_()
    nothing = module.divergence(empty, mine.requires_grad_(), teacher[:0], taught, grid.tensor.group, REAL, divergences()["forward_kl"], temperature=1.0)
    nothing.sum().backward()
    return {**results, "same": same.detach(), "nothing": (len(nothing), empty.grad is not None and mine.grad is not None)}

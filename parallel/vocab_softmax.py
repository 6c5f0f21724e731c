"""Whole distributions when the vocabulary is cut over tensor-parallel ranks: log-softmax over shards, chosen entries, sums.

Each rank has v = V / TP columns of logits. Only numbers a token travel: the largest logit, the sum of exponentials, and in
backward the sum of the incoming gradient.

# N tokens, V vocabulary, v = V/TP, K chosen tokens
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def vocab_parallel_log_softmax(logits_Nv: Tensor, group: Any) -> Tensor:
    """This rank's columns of log softmax over all ranks' columns, [N, v] in the dtype of the logits.

    Backward is that of the sum of all ranks' losses, each a function of its own columns: dz = g - softmax * (sum of g over
    all V columns).
    """
    return _LogSoftmax.apply(logits_Nv, group)  # pyright: ignore[reportReturnType]


def sum_of_shards(partial: Tensor, group: Any) -> Tensor:
    """The sum of every rank's part, on all of them; each rank's gradient is that of its own part."""
    return _SumOfShards.apply(partial, group) if group.size() > 1 else partial  # pyright: ignore[reportReturnType]


def chosen_columns(shard_Nv: Tensor, ids_NK: Tensor, group: Any) -> Tensor:
    """Columns `ids_NK` (of the whole vocabulary) of a matrix whose columns are cut over the ranks, [N, K] on all of them."""
    here = ids_NK - group.rank() * shard_Nv.shape[-1]
    mine = (here >= 0) & (here < shard_Nv.shape[-1])
    found = shard_Nv.gather(-1, here.clamp(0, shard_Nv.shape[-1] - 1))
    return sum_of_shards(torch.where(mine, found, 0.0), group)


def top_columns(shard_Nv: Tensor, k: int, group: Any) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row over all ranks' columns: values [N, k], and their ids in the whole vocabulary. No gradient."""
    own = shard_Nv.detach().topk(min(k, shard_Nv.shape[-1]), -1)
    values, ids = own.values.contiguous(), own.indices + group.rank() * shard_Nv.shape[-1]
    if group.size() > 1:
        parts = [[torch.empty_like(x) for _ in range(group.size())] for x in (values, ids)]
        dist.all_gather(parts[0], values, group=group)
        dist.all_gather(parts[1], ids.contiguous(), group=group)
        values, ids = (torch.cat(part, -1) for part in parts)
    best = values.topk(k, -1)
    return best.values, ids.gather(-1, best.indices)


class _LogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, group: Any) -> Tensor:  # pyright: ignore
        maximum = logits.amax(-1, keepdim=True)
        if group.size() > 1:
            dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
        total = (logits - maximum).exp().sum(-1, keepdim=True)
        if group.size() > 1:
            dist.all_reduce(total, group=group)
        logprobs = logits - maximum - total.log()
        ctx.save_for_backward(logprobs)
        ctx.group = group
        return logprobs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        (logprobs,) = ctx.saved_tensors
        total = grad.sum(-1, keepdim=True)
        if ctx.group.size() > 1:
            dist.all_reduce(total, group=ctx.group)
        return grad - logprobs.exp() * total, None


class _SumOfShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: Any) -> Tensor:  # pyright: ignore
        total = partial.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        return grad, None

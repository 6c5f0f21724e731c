"""Log-probabilities of given tokens when the vocabulary is cut over tensor-parallel ranks.

Each rank holds v = V / TP rows of the output layer and scores only those (`megalign.kernels.logprob`: chunked, the logits
never exist at once; Triton on CUDA, torch on CPU). The group exchanges four numbers a token: the largest logit, the sum of
exponentials, the target's logit, and for entropy the sum of exponentials times logits.

# N scored tokens, D model, V vocabulary, v = V/TP
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalign.kernels.logprob import LogProbs, Statistics, linear_logprobs


def vocab_parallel_logprobs(
    hidden_ND: Tensor, weight_vD: Tensor, targets_N: Tensor, group: Any, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden @ weight')[target] and whether the target has the largest logit.

    hidden_ND: the same on every rank of `group`; its gradient comes back partial and is to be summed over the
    group by whoever produced it (see `megalign.models.gpt`). weight_vD: this rank's rows. targets_N: int64
    in [0, V). vocab_size: V; rows of the table past it are padding and take no part. Returns FP32 log-probabilities [N] (<= 0) and bool [N] (no gradient).
    """
    found = _shard_logprobs(hidden_ND, weight_vD, targets_N, group, vocab_size, entropy=False)
    return found.logprobs, found.correct


def vocab_parallel_logprobs_and_entropy(hidden_ND: Tensor, weight_vD: Tensor, targets_N: Tensor, group: Any, vocab_size: int) -> LogProbs:
    """As `vocab_parallel_logprobs`, and the entropy [N] of each token's softmax over the whole vocabulary, in nats."""
    return _shard_logprobs(hidden_ND, weight_vD, targets_N, group, vocab_size, entropy=True)


def _shard_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, group: Any, vocab_size: int, *, entropy: bool) -> LogProbs:
    first = group.rank() * weight.shape[0]
    real = min(max(0, vocab_size - first), weight.shape[0])
    reduce = partial(_over_ranks, group=group, entropy=entropy) if group.size() > 1 else None
    return linear_logprobs(hidden, weight, targets - first, rows=real, entropy=entropy, reduce=reduce)


def _over_ranks(own: Statistics, *, group: Any, entropy: bool) -> Statistics:
    """Statistics of every shard from this rank's: one maximum, one sum over the group."""
    maximum = own.maximum.clone()
    dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
    sums = torch.stack(own.rescaled(maximum)[1 : 4 if entropy else 3])
    dist.all_reduce(sums, group=group)
    return Statistics(maximum, sums[0], sums[1], sums[2] if entropy else own.weighted)

"""Log-probabilities of given tokens when the vocabulary is cut over tensor-parallel ranks.

Each rank holds v = V / TP rows of the output layer and scores only those; the group exchanges three numbers
a token: the largest logit, the sum of exponentials, the target's logit. Everything after the matmul is FP32.
Tokens are processed in chunks, and within one the softmax overwrites the logits: at most one [chunk, v]
buffer lives, or, when `recompute` is off, one [N, v] buffer until the backward pass.

# N scored tokens, D model, V vocabulary, v = V/TP
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK = 2048
KEEP_BELOW = 2**26  # logits kept for backward instead of recomputed: 256 MB in FP32


def vocab_parallel_logprobs(
    hidden_ND: Tensor, weight_vD: Tensor, targets_N: Tensor, group: Any, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden @ weight')[target] and whether the target has the largest logit.

    hidden_ND: the same on every rank of `group`; its gradient comes back partial and is to be summed over the
    group by whoever produced it (see `megalign.models.gpt`). weight_vD: this rank's rows. targets_N: int64
    in [0, V). vocab_size: V; rows of the table past it are padding and take no part. Returns FP32 log-probabilities [N] (<= 0) and bool [N] (no gradient).
    """
    return _VocabParallelLogprobs.apply(hidden_ND, weight_vD, targets_N, group, vocab_size)  # pyright: ignore[reportReturnType]


class _VocabParallelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, group: Any, vocab_size: int) -> tuple[Tensor, Tensor]:  # pyright: ignore
        recompute = hidden.shape[0] * weight.shape[0] > KEEP_BELOW
        logprobs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        correct = torch.empty(len(targets), dtype=torch.bool, device=hidden.device)
        kept, statistics = [], []
        for rows in _chunks(len(targets)):
            softmax, maximum, total, target_logit = _local_softmax(_local_logits(hidden[rows], weight, group, vocab_size), targets[rows], group)
            logprobs[rows] = target_logit - total.log()
            correct[rows] = target_logit >= 0  # logits have the maximum subtracted
            kept.append(None if recompute else softmax.div_(total.unsqueeze(-1)))
            statistics.append(maximum + total.log())
        ctx.save_for_backward(hidden, weight, targets, *statistics)
        ctx.kept, ctx.group, ctx.vocab_size = kept, group, vocab_size
        ctx.mark_non_differentiable(correct)
        return logprobs, correct

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor, _: Any) -> tuple[Tensor, Tensor, None, None, None]:  # pyright: ignore
        hidden, weight, targets, *statistics = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        first = _first_row(weight, ctx.group)
        for i, rows in enumerate(_chunks(len(targets))):
            softmax, ctx.kept[i] = ctx.kept[i], None
            if softmax is None:
                softmax = _local_logits(hidden[rows], weight, ctx.group, ctx.vocab_size).sub_(statistics[i].unsqueeze(-1)).exp_()
            # d logp[n] / d logit[n, j] = (j is the target) - softmax[n, j]
            grad = grad_N[rows].float()
            grad_logits = softmax.mul_(-grad.unsqueeze(-1))
            local = targets[rows] - first
            here = ((local >= 0) & (local < weight.shape[0])).nonzero().squeeze(-1)
            grad_logits[here, local[here]] += grad[here]
            grad_logits = grad_logits.to(hidden.dtype)
            grad_hidden[rows] = grad_logits @ weight
            grad_weight.addmm_(grad_logits.t(), hidden[rows])
        return grad_hidden, grad_weight, None, None, None


def _local_logits(hidden: Tensor, weight: Tensor, group: Any, vocab_size: int) -> Tensor:
    """FP32 logits [n, v] of this rank's rows, -inf for padding rows."""
    logits = (hidden @ weight.t()).float()
    real = max(0, vocab_size - _first_row(weight, group))
    logits[:, real:] = float("-inf")
    return logits


def _local_softmax(logits: Tensor, targets: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """exp(logit - max) [n, v] in the place of the logits, max [n], its sum over V [n], the target's logit less the max [n]."""
    maximum = logits.amax(-1)
    if group.size() > 1:
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
    logits.sub_(maximum.unsqueeze(-1))
    rows = logits.shape[-1]
    local = targets - group.rank() * rows
    here = (local >= 0) & (local < rows)
    target_logit = logits.gather(-1, local.clamp(0, rows - 1).unsqueeze(-1)).squeeze(-1).masked_fill(~here, 0.0)
    exponentials = logits.exp_()
    sums = torch.stack([exponentials.sum(-1), target_logit])
    if group.size() > 1:
        dist.all_reduce(sums, group=group)
    return exponentials, maximum, sums[0], sums[1]


def _first_row(weight: Tensor, group: Any) -> int:
    return group.rank() * weight.shape[0]


def _chunks(count: int) -> list[slice]:
    return [slice(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]

"""Log-probabilities and entropy straight from hidden states: the logits of a long batch never exist at once.

    l[n, j] = hidden[n] . weight[j]        log Z[n] = log sum_j exp l[n, j]        p[n, j] = exp(l[n, j] - log Z[n])
    logprob[n] = l[n, target n] - log Z[n]                entropy[n] = log Z[n] - sum_j p[n, j] l[n, j]

`weight` may be one shard of the vocabulary. Its statistics (`Statistics`: four numbers a token) merge into those of the
whole by `merged`: over the splits of a kernel here, over tensor-parallel ranks in `megalign.parallel.vocab`, which hands in
the reduction as `reduce`. Backward, with upstream g (of logprob) and h (of entropy), needs no other rank's logits:

    d/dl[n, j] = g[n] (j is the target) - p[n, j] (g[n] + h[n] (log p[n, j] + entropy[n]))

Tokens are walked in chunks, and within one the softmax overwrites the logits: one [chunk, v] buffer lives (a second one for
the gradient of entropy). Up to KEEP_BELOW logits are kept for backward, beyond that they are computed again: memory
O(chunk v) for one more matmul. Everything after the matmul is FP32 (FP64 for FP64 inputs). On CUDA a chunk is one kernel
(`logprob_triton.py`); the arithmetic below is its reference and the path on CPU.

# N scored tokens, n those of a chunk, D model, v rows of this shard
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK_ROWS = 2048
CHUNK_LOGITS = 2**26  # 256 MB in FP32: with a large vocabulary a chunk has fewer rows
KEEP_BELOW = 2**26  # logits kept for backward instead of recomputed


class Statistics(NamedTuple):
    """What the softmax of token n needs of a shard: max_j l, sum_j exp(l - max), the target's logit (0 if it lies in
    another shard), sum_j exp(l - max) (l - max); each [N], FP32. A merged one has the same meaning for all shards."""

    maximum: Tensor
    total: Tensor
    target: Tensor
    weighted: Tensor

    def rescaled(self, maximum: Tensor) -> Statistics:
        """The same sums relative to a larger maximum."""
        shift = (self.maximum - maximum).clamp(min=-1e4)  # exp(-1e4) is 0; the difference itself may overflow
        scale = shift.exp()
        return Statistics(maximum, self.total * scale, self.target, scale * (self.weighted + shift * self.total))


def merged(shards: Statistics) -> Statistics:
    """Statistics [S, N] of S shards -> [N] of all."""
    maximum = shards.maximum.amax(0)
    return Statistics(maximum, *(part.sum(0) for part in shards.rescaled(maximum)[1:]))


class LogProbs(NamedTuple):
    """logprobs [N] (<= 0), entropy [N] (zeros unless asked for), correct [N] bool: the target has the largest logit."""

    logprobs: Tensor
    entropy: Tensor
    correct: Tensor


def linear_logprobs(
    hidden_ND: Tensor,
    weight_vD: Tensor,
    targets_N: Tensor,
    *,
    rows: int | None = None,
    entropy: bool = False,
    reduce: Callable[[Statistics], Statistics] | None = None,
) -> LogProbs:
    """log softmax(hidden weight')[target] and the entropy of that softmax, both differentiable.

    targets_N: int64 rows of this shard; numbers outside [0, v) stand for targets of other shards. rows: how many rows of the weight are
    tokens; those past them are padding, take no part and get a zero gradient; None: all. reduce: from statistics
    of this shard to those of all; None: there is one shard. The gradient of `hidden` is this shard's part of the sum.
    Raises ValueError for shapes that do not fit together.
    """
    if hidden_ND.dim() != 2 or weight_vD.dim() != 2 or hidden_ND.shape[1] != weight_vD.shape[1] or targets_N.shape != hidden_ND.shape[:1]:
        raise ValueError(f"hidden {tuple(hidden_ND.shape)}, weight {tuple(weight_vD.shape)} and targets {tuple(targets_N.shape)} must be [N, D], [v, D] and [N]")
    real = weight_vD.shape[0] if rows is None else rows
    return LogProbs(*_LinearLogprobs.apply(hidden_ND, weight_vD, targets_N, real, entropy, reduce))  # pyright: ignore[reportGeneralTypeIssues]


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int, entropy: bool, reduce: Any) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore
        backend = _backend(hidden)
        keep = any(ctx.needs_input_grad[:2]) and hidden.shape[0] * rows <= KEEP_BELOW
        own, kept = backend.shard_statistics(hidden, weight[:rows], targets, entropy=entropy, keep=keep)
        whole = own if reduce is None else reduce(own)
        log_total = whole.total.log()
        logprobs = whole.target - whole.maximum - log_total
        entropies = log_total - whole.weighted / whole.total if entropy else torch.zeros_like(logprobs)
        ctx.save_for_backward(hidden, weight, targets, whole.maximum + log_total, entropies, own.maximum)
        ctx.backend, ctx.kept, ctx.rows, ctx.entropy = backend, kept, rows, entropy
        correct = whole.target >= whole.maximum
        ctx.mark_non_differentiable(correct)
        return logprobs, entropies, correct

    @staticmethod
    def backward(ctx: Any, g: Tensor, h: Tensor, _: Any) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:  # pyright: ignore
        hidden, weight, targets, log_z, entropies, own_maximum = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None  # overwritten below: a second backward computes the logits again
        grad_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        ctx.backend.shard_gradients(
            hidden, weight[: ctx.rows], targets, log_z, g.to(log_z.dtype), h.to(log_z.dtype) if ctx.entropy else None, entropies,
            kept=kept, maximum=own_maximum, grad_hidden=grad_hidden, grad_weight=None if grad_weight is None else grad_weight[: ctx.rows],
        )  # fmt: skip
        return grad_hidden, grad_weight, None, None, None, None


def _backend(hidden: Tensor) -> Any:
    """Triton on CUDA; in FP64, as a probe of gradients asks for, torch there too: the kernels add in FP32."""
    if hidden.is_cuda and hidden.dtype != torch.float64 and importlib.util.find_spec("triton") is not None:
        from megalign.kernels import logprob_triton

        return logprob_triton
    return _Torch


class _Torch:
    """The reference."""

    @staticmethod
    def shard_statistics(hidden: Tensor, weight: Tensor, targets: Tensor, *, entropy: bool, keep: bool) -> tuple[Statistics, list[Tensor] | None]:
        """Statistics of this shard and, if `keep`, exp(l - max) of each chunk."""
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        found = Statistics(*torch.zeros(4, len(targets), dtype=wide, device=hidden.device))
        if weight.shape[0] == 0:
            found.maximum.fill_(torch.finfo(wide).min)
            return found, [] if keep else None
        kept: list[Tensor] = []
        logits_of = _Logits(hidden, weight, wide, reuse=not keep)
        for rows in chunks(len(targets), weight.shape[0]):
            logits = logits_of(rows)
            target, here = _own(targets[rows], weight.shape[0])
            torch.amax(logits, -1, out=found.maximum[rows])
            found.target[rows] = logits.gather(-1, target.unsqueeze(-1)).squeeze(-1).masked_fill(~here, 0.0)
            logits.sub_(found.maximum[rows].unsqueeze(-1))
            if entropy:
                exponentials = logits.exp()
                found.weighted[rows] = torch.einsum("nv,nv->n", exponentials, logits)
            else:
                exponentials = logits.exp_()
            torch.sum(exponentials, -1, out=found.total[rows])
            if keep:
                kept.append(exponentials)
            del exponentials  # else those of the next chunk are made beside these: a third buffer
        return found, kept if keep else None

    @staticmethod
    def shard_gradients(
        hidden: Tensor, weight: Tensor, targets: Tensor, log_z: Tensor, g: Tensor, h: Tensor | None, entropies: Tensor,
        *, kept: list[Tensor] | None, maximum: Tensor, grad_hidden: Tensor | None, grad_weight: Tensor | None,
    ) -> None:  # fmt: skip
        """Writes the gradient of hidden and adds that of the weight; both arrive as zeros, or None if not wanted."""
        if weight.shape[0] == 0:
            return
        logits_of = _Logits(hidden, weight, log_z.dtype, reuse=True)
        for i, rows in enumerate(chunks(len(targets), weight.shape[0])):
            g_n = g[rows].unsqueeze(-1)
            if kept is None:
                log_p = logits_of(rows).sub_(log_z[rows].unsqueeze(-1))
                p = log_p.exp_() if h is None else log_p.exp()
            else:
                p, kept[i] = kept[i], None  # pyright: ignore[reportArgumentType, reportCallIssue]
                p.mul_((maximum[rows] - log_z[rows]).exp().unsqueeze(-1))
                log_p = p if h is None else p.clamp(min=torch.finfo(p.dtype).tiny).log_()
            if h is None:
                grad_logits = p.mul_(-g_n)
            else:
                grad_logits = log_p.add_(entropies[rows].unsqueeze(-1)).mul_(h[rows].unsqueeze(-1)).add_(g_n).mul_(p).neg_()
            target, here = _own(targets[rows], weight.shape[0])
            mine = here.nonzero().squeeze(-1)
            grad_logits[mine, target[mine]] += g_n[mine].squeeze(-1)
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight.addmm_(grad_logits.t(), hidden[rows])
            del p, log_p, grad_logits  # as in the forward pass


class _Logits:
    """hidden[rows] weight' in the wide type; `reuse` writes every chunk into the same memory."""

    def __init__(self, hidden: Tensor, weight: Tensor, wide: torch.dtype, *, reuse: bool):
        self.hidden, self.weight, self.wide, self.reuse = hidden, weight, wide, reuse
        self.memory: Tensor | None = None

    def __call__(self, rows: slice) -> Tensor:
        part = self.hidden[rows]
        if self.hidden.dtype != self.wide:
            return (part @ self.weight.t()).to(self.wide)
        if self.memory is None or not self.reuse:
            self.memory = part.new_empty(len(part), self.weight.shape[0])
        return torch.mm(part, self.weight.t(), out=self.memory[: len(part)])


def _own(targets: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(row of this shard, whether it is one)."""
    return targets.clamp(0, count - 1), (targets >= 0) & (targets < count)


def chunks(count: int, vocabulary: int) -> list[slice]:
    """Rows of the chunks: at most CHUNK_ROWS, and at most CHUNK_LOGITS logits unless that is under 64 rows."""
    size = min(CHUNK_ROWS, max(64, CHUNK_LOGITS // max(1, vocabulary)))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]

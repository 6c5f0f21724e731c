"""How far a student's next-token distributions are from a teacher's, without the logits of a batch ever existing at once.

Both output layers are cut over tensor-parallel ranks alike. Tokens are taken some at a time: logits of the shard, their
log-softmax over all shards, the divergence of the shard's columns, its sum over ranks. A divergence is a sum over the
vocabulary, so the pure functions of `megalign/losses/distill.py` are applied to shards as they are. What a chunk needs in
backward is computed again there.

# N scored tokens, D and E hidden sizes of student and teacher, V vocabulary, v = V/TP, K tokens kept of the teacher
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megalign.losses.distill import top_k_forward_kl
from megalign.parallel.vocab_softmax import (
    chosen_columns,
    sum_of_shards,
    top_columns,
    vocab_parallel_log_softmax,
)

CHUNK_LOGITS = 2**23  # of a shard at a time: 32 MiB in FP32, of which a chunk holds some six
OUT = -1e30  # logit of a padding row of the table: finite, so that 0 * (OUT - OUT) is 0

Divergence = Callable[[Tensor, Tensor], Tensor]  # log-probs of student and teacher [n, v] -> [n]


def divergence(
    hidden_ND: Tensor, weight_vD: Tensor, teacher_NE: Tensor, teacher_weight_vE: Tensor, group: Any, vocab_size: int, of: Divergence, *, temperature: float
) -> Tensor:
    """[N] FP32, the same on every rank: `of` the two distributions at `temperature`.

    The gradient of hidden_ND comes back partial, as that of `vocab_parallel_logprobs` does; the teacher has none.
    """

    def chunk(hidden: Tensor, weight: Tensor, teacher: Tensor) -> Tensor:
        student = shard_logprobs(hidden, weight, group, vocab_size, temperature)
        with torch.no_grad():
            taught = shard_logprobs(teacher, teacher_weight_vE, group, vocab_size, temperature)
        return sum_of_shards(of(student, taught), group)

    return _by_chunks(chunk, hidden_ND, weight_vD, teacher_NE)


def top_k_divergence(
    hidden_ND: Tensor, weight_vD: Tensor, ids_NK: Tensor, teacher_logprobs_NK: Tensor, group: Any, vocab_size: int, *, temperature: float
) -> Tensor:
    """[N] FP32, the same on every rank: KL(teacher || student) over the K tokens of a cached teacher and one bin for the rest."""

    def chunk(hidden: Tensor, weight: Tensor, ids: Tensor, taught: Tensor) -> Tensor:
        student = shard_logprobs(hidden, weight, group, vocab_size, temperature)
        return top_k_forward_kl(chosen_columns(student, ids, group), taught)

    return _by_chunks(chunk, hidden_ND, weight_vD, ids_NK, teacher_logprobs_NK)


@torch.no_grad()
def top_k_of(hidden_NE: Tensor, weight_vE: Tensor, group: Any, vocab_size: int, k: int, *, temperature: float) -> tuple[Tensor, Tensor]:
    """(log-probs [N, K] FP32, ids [N, K]) of the most probable tokens, the same on every rank; what a cached teacher keeps."""
    found = [top_columns(shard_logprobs(hidden, weight_vE, group, vocab_size, temperature), k, group) for hidden in hidden_NE.split(_rows(weight_vE))]
    return torch.cat([values for values, _ in found]), torch.cat([ids for _, ids in found])


def shard_logprobs(hidden_ND: Tensor, weight_vD: Tensor, group: Any, vocab_size: int, temperature: float) -> Tensor:
    """[N, v] FP32 log-probs of this rank's rows of the table at `temperature`; rows past the vocabulary have none."""
    logits = (hidden_ND @ weight_vD.t()).float() / temperature
    real = vocab_size - group.rank() * weight_vD.shape[0]
    if real < weight_vD.shape[0]:
        padding = torch.arange(weight_vD.shape[0], device=logits.device) >= real
        logits = logits.masked_fill(padding, OUT)
    return vocab_parallel_log_softmax(logits, group)


def _rows(weight_vD: Tensor) -> int:
    return max(1, CHUNK_LOGITS // weight_vD.shape[0])


def _by_chunks(chunk: Callable[..., Tensor], hidden_ND: Tensor, weight_vD: Tensor, *others: Tensor) -> Tensor:
    if not len(hidden_ND):  # padding alone: gradients are zero, not missing
        return (hidden_ND.sum() + weight_vD.sum()).float() * hidden_ND.new_zeros(0, dtype=torch.float32)
    parts = zip(*(x.split(_rows(weight_vD)) for x in (hidden_ND, *others)))
    found = [checkpoint(chunk, hidden, weight_vD, *rest, use_reentrant=False, preserve_rng_state=False) for hidden, *rest in parts]
    return torch.cat([part for part in found if part is not None])

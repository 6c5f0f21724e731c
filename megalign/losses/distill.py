"""Distillation: how far a student is from a teacher on N tokens. Equal models lose 0.

# N tokens, V vocabulary, K most probable tokens kept of the teacher
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalign.losses.loss import TokenLoss
from megalign.losses.preference import log1mexp


def sequence_distillation_loss(logprobs_N: Tensor, teacher_logprobs_N: Tensor) -> TokenLoss:
    """log p_teacher - log p_student of the teacher's own tokens (arXiv:1606.07947).

    One sample's estimate of KL(teacher || student), and the gradient of `cross_entropy_loss` on the teacher's answers.
    """
    return TokenLoss((teacher_logprobs_N.detach() - logprobs_N).sum(), logprobs_N.numel(), {})


def forward_kl(logprobs_NV: Tensor, teacher_logprobs_NV: Tensor) -> Tensor:
    """[N] KL(teacher || student) (arXiv:1503.02531, without its factor temperature^2).

    As the other two divergences a sum over the vocabulary: of a part of its columns it gives that part's share.
    """
    return _kl(teacher_logprobs_NV, logprobs_NV)


def reverse_kl(logprobs_NV: Tensor, teacher_logprobs_NV: Tensor) -> Tensor:
    """[N] KL(student || teacher): the student may leave out what it cannot do (arXiv:2306.08543)."""
    return _kl(logprobs_NV, teacher_logprobs_NV)


def jensen_shannon(logprobs_NV: Tensor, teacher_logprobs_NV: Tensor, *, beta: float = 0.5) -> Tensor:
    """[N] beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student, 0 < beta < 1.

    Generalised divergence of arXiv:2306.13649, eq. 1. In TRL's GKD beta 0 and 1 mean forward and reverse KL: here
    those are functions of their own, and the formula would be 0.
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta is {beta}, outside (0, 1); for KL(teacher || student) take forward_kl, for KL(student || teacher) reverse_kl")
    student, teacher = logprobs_NV, teacher_logprobs_NV
    share = torch.tensor([1 - beta, beta], dtype=student.dtype, device=student.device).log()
    mixture = torch.logaddexp(student + share[0], teacher + share[1])
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def top_k_forward_kl(logprobs_NK: Tensor, teacher_logprobs_NK: Tensor) -> Tensor:
    """[N] KL(teacher || student) over the teacher's K tokens and one bin for all others, for cached teachers.

    Both: log-probabilities of the same K tokens. A lower bound of the KL over V. Of a confident teacher the K tokens sum to
    1 as rounded, and log(1 - 1) says nothing: what they leave is taken as 1e-6 at least (`log1mexp`).
    """
    teacher = teacher_logprobs_NK.detach()
    rest, teacher_rest = (log1mexp(x.logsumexp(-1)) for x in (logprobs_NK, teacher))
    return _kl(teacher, logprobs_NK) + teacher_rest.exp() * (teacher_rest - rest)


def forward_kl_loss(logits_NV: Tensor, teacher_logits_NV: Tensor, *, temperature: float = 1.0) -> TokenLoss:
    """`forward_kl` of logits, both at `temperature`."""
    return _tokens(forward_kl(*_log_softmax_of_both(logits_NV, teacher_logits_NV, temperature)))


def reverse_kl_loss(logits_NV: Tensor, teacher_logits_NV: Tensor, *, temperature: float = 1.0) -> TokenLoss:
    """`reverse_kl` of logits, both at `temperature`."""
    return _tokens(reverse_kl(*_log_softmax_of_both(logits_NV, teacher_logits_NV, temperature)))


def jensen_shannon_loss(logits_NV: Tensor, teacher_logits_NV: Tensor, *, beta: float = 0.5, temperature: float = 1.0) -> TokenLoss:
    """`jensen_shannon` of logits, both at `temperature`."""
    return _tokens(jensen_shannon(*_log_softmax_of_both(logits_NV, teacher_logits_NV, temperature), beta=beta))


def top_k_forward_kl_loss(logprobs_NK: Tensor, teacher_logprobs_NK: Tensor) -> TokenLoss:
    """The sum of `top_k_forward_kl`."""
    return _tokens(top_k_forward_kl(logprobs_NK, teacher_logprobs_NK))


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) [N] of log-probabilities."""
    return (p.exp() * (p - q)).sum(-1)


def _log_softmax_of_both(logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return _log_softmax(logits, temperature), _log_softmax(teacher_logits, temperature).detach()


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Finite, so that a padding row of the vocabulary, -inf in both models, counts 0 and has no gradient."""
    return (logits if logits.dtype == torch.float64 else logits.float()).div(temperature).log_softmax(-1).clamp(min=-1e30)


def _tokens(losses_N: Tensor) -> TokenLoss:
    return TokenLoss(losses_N.sum(), losses_N.numel(), {})

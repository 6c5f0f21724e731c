"""Distillation: equal models lose 0, and divergences are those of torch.distributions."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck
from torch.distributions import Categorical, kl_divergence

from megalign.losses.distill import (
    forward_kl_loss,
    jensen_shannon_loss,
    reverse_kl_loss,
    sequence_distillation_loss,
    top_k_forward_kl_loss,
)

torch.manual_seed(0)
STUDENT, TEACHER = torch.randn(2, 6, 9, dtype=torch.float64)
FULL = (forward_kl_loss, reverse_kl_loss, jensen_shannon_loss)


@pytest.mark.parametrize("loss", FULL)
def test_equal_models_lose_nothing(loss):
    """S10."""
    found = loss(TEACHER.clone().requires_grad_(), TEACHER, temperature=2.0)
    assert abs(found.sum.item()) < 1e-12 and found.count == 6
    assert loss(STUDENT, TEACHER).sum.item() > 0.1


def test_equal_models_lose_nothing_by_sequence_and_by_top_k():
    logprobs = TEACHER.log_softmax(-1)
    assert sequence_distillation_loss(logprobs[:, 3], logprobs[:, 3]).sum.item() == 0
    assert abs(top_k_forward_kl_loss(logprobs[:, :4], logprobs[:, :4]).sum.item()) < 1e-12


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergences(temperature: float):
    student, teacher = Categorical(logits=STUDENT / temperature), Categorical(logits=TEACHER / temperature)
    mixture = Categorical(probs=0.3 * teacher.probs + 0.7 * student.probs)
    wanted = kl_divergence(teacher, student).sum()
    assert forward_kl_loss(STUDENT, TEACHER, temperature=temperature).sum.item() == pytest.approx(wanted.item())
    wanted = kl_divergence(student, teacher).sum()
    assert reverse_kl_loss(STUDENT, TEACHER, temperature=temperature).sum.item() == pytest.approx(wanted.item())
    wanted = (0.3 * kl_divergence(teacher, mixture) + 0.7 * kl_divergence(student, mixture)).sum()
    assert jensen_shannon_loss(STUDENT, TEACHER, beta=0.3, temperature=temperature).sum.item() == pytest.approx(wanted.item())


@pytest.mark.parametrize("loss", FULL)
def test_gradients_reach_the_student_alone(loss):
    student, teacher = STUDENT[:2, :4].clone().requires_grad_(), TEACHER[:2, :4].clone().requires_grad_()
    assert gradcheck(lambda x: loss(x, TEACHER[:2, :4]).sum, (student,))
    loss(student, teacher).sum.backward()
    assert teacher.grad is None and student.grad is not None


def test_top_k_bounds_the_divergence_from_below_and_reaches_it():
    student, teacher = STUDENT.log_softmax(-1), TEACHER.log_softmax(-1)
    full = forward_kl_loss(STUDENT, TEACHER).sum.item()
    values = []
    for k in (1, 3, 8):  # the last leaves one token, which is its own bin
        top = TEACHER.topk(k, -1).indices
        values.append(top_k_forward_kl_loss(student.gather(-1, top), teacher.gather(-1, top)).sum.item())
    assert 0 < values[0] < values[1] < values[2] == pytest.approx(full)
    top = TEACHER.topk(3, -1).indices
    assert gradcheck(lambda x: top_k_forward_kl_loss(x.log_softmax(-1).gather(-1, top), teacher.gather(-1, top)).sum, (STUDENT.clone().requires_grad_(),))


def test_sequence_distillation_has_the_gradient_of_cross_entropy():
    logprobs = STUDENT.log_softmax(-1)[:, 2].clone().requires_grad_()
    sequence_distillation_loss(logprobs, TEACHER.log_softmax(-1)[:, 2]).sum.backward()
    assert logprobs.grad is not None and (logprobs.grad == -1).all()


@pytest.mark.parametrize("loss", FULL)
def test_padding_rows_of_the_vocabulary_count_nothing(loss):
    """Their logits are -inf in both models."""
    padded = [torch.cat([x, torch.full((6, 3), -torch.inf, dtype=x.dtype)], -1).requires_grad_() for x in (STUDENT, TEACHER)]
    found = loss(*padded)
    assert found.sum.item() == pytest.approx(loss(STUDENT, TEACHER).sum.item())
    found.sum.backward()
    assert padded[0].grad is not None and torch.isfinite(padded[0].grad).all() and (padded[0].grad[:, 9:] == 0).all()


def test_a_mixture_that_is_none_is_refused():
    with pytest.raises(ValueError, match="beta is 0, outside"):
        jensen_shannon_loss(STUDENT, TEACHER, beta=0)


def test_a_teacher_that_is_sure_leaves_finite_losses():
    """Of K probabilities that sum to 1, or to a little more, as rounded in FP32."""
    sure = torch.tensor([[0.0, -20.0], [1e-7, -30.0], [-0.7, -0.6862349]]).requires_grad_()
    found = top_k_forward_kl_loss(sure, torch.tensor([[0.0, -25.0], [-1e-9, -40.0], [-0.69314718, -0.69314718]]))
    found.sum.backward()
    assert torch.isfinite(found.sum) and sure.grad is not None and torch.isfinite(sure.grad).all()

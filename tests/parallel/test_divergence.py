"""Divergences over a cut vocabulary equal those of whole float64 distributions, values and gradients; logits are not kept."""

from __future__ import annotations

import divergence_checks
import pytest
import torch
from divergence_checks import REAL, K, N, V, inputs
from ranks import run_ranks
from torch.distributions import Categorical, kl_divergence


def whole(name: str, temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values [N] and gradients of hidden states and table, from torch.distributions in float64."""
    hidden, weight, teacher, teacher_weight, upstream = (x.double() for x in inputs())
    hidden.requires_grad_()
    weight.requires_grad_()
    logits = [(h @ w.t())[:, :REAL] / temperature for h, w in ((hidden, weight), (teacher, teacher_weight))]
    student, taught = (Categorical(logits=x) for x in logits)
    if name == "forward_kl":
        found = kl_divergence(taught, student)
    elif name == "reverse_kl":
        found = kl_divergence(student, taught)
    elif name == "jensen_shannon":
        mixture = Categorical(probs=0.3 * taught.probs + 0.7 * student.probs)
        found = 0.3 * kl_divergence(taught, mixture) + 0.7 * kl_divergence(student, mixture)
    else:  # K tokens and a bin for the rest
        ids = logits[1].topk(K, -1).indices
        p, q = ([*dist.probs.gather(-1, ids).unbind(-1), 1 - dist.probs.gather(-1, ids).sum(-1)] for dist in (taught, student))
        found = sum((a * (a / b).log() for a, b in zip(p, q)), torch.zeros(N, dtype=torch.float64))
    (found * upstream).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    return found.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("world, temperature", [(1, 1.0), (2, 2.0)])
def test_divergences_and_gradients_are_those_of_whole_distributions(world: int, temperature: float):
    ranks = run_ranks(divergence_checks.check, world, temperature)
    for name in (*divergence_checks.divergences(), "top_k"):
        values, hidden, weight = whole(name, temperature)
        for rank in ranks:
            torch.testing.assert_close(rank[name]["values"].double(), values, rtol=1e-5, atol=1e-6)
            assert rank[name]["kept"] <= max(N * 16, V * 16), "inputs are kept, logits of all tokens are not"
        found = {"hidden": sum(rank[name]["hidden"] for rank in ranks), "weight": torch.cat([rank[name]["weight"] for rank in ranks])}
        for part, expected in (("hidden", hidden), ("weight", weight)):
            torch.testing.assert_close(found[part].double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
        assert not found["weight"][REAL:].any(), "padding rows learn nothing"
    if world == 2:
        for rank in ranks:
            assert min(rank["mistakes"].values()) > 1e-3, rank["mistakes"]
    teacher, teacher_weight = inputs()[2:4]
    logprobs, ids = ((teacher @ teacher_weight.t())[:, :REAL] / temperature).log_softmax(-1).topk(K, -1)
    for rank in ranks:
        assert torch.equal(rank["top"][0], ids)
        torch.testing.assert_close(rank["top"][1], logprobs, rtol=0, atol=2e-6)
        assert not rank["same"].any(), "S10: equal models lose exactly 0"
        assert rank["nothing"] == (0, True), "padding alone: zero gradients, none missing"

"""Vocabulary-parallel log-probabilities against torch's log_softmax, values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks

N, D, V, REAL = 37, 16, 24, 21  # three padding rows


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    return torch.randn(N, D) * 4, torch.randn(V, D), torch.randint(0, REAL, (N,)), torch.randn(N)


def check_logprobs(recompute: bool) -> dict[str, Any]:
    """This rank's result and gradients; with chunks that do not divide N."""
    import torch.distributed as dist

    from megalign.parallel import vocab
    from megalign.parallel.grid import create_grid

    vocab.CHUNK, vocab.KEEP_BELOW = 10, 0 if recompute else 2**26
    grid = create_grid(tensor_model_parallel_size=dist.get_world_size())
    hidden, weight, targets, upstream = _inputs()
    mine = weight.chunk(grid.tensor.size)[grid.tensor.rank].clone().requires_grad_()
    hidden.requires_grad_()
    logprobs, correct = vocab.vocab_parallel_logprobs(hidden, mine, targets, grid.tensor.group, REAL)
    logprobs.backward(upstream)
    return {"logprobs": logprobs.detach(), "correct": correct, "hidden": hidden.grad, "weight": mine.grad}


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("recompute", [False, True])
def test_logprobs_and_gradients_are_those_of_log_softmax(world: int, recompute: bool):
    hidden, weight, targets, upstream = _inputs()
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = (hidden @ weight.t())[:, :REAL]
    expected = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    expected.backward(upstream.double())
    ranks = run_ranks(check_logprobs, world, recompute)
    for rank in ranks:
        torch.testing.assert_close(rank["logprobs"].double(), expected.detach(), rtol=0, atol=2e-5)
        assert torch.equal(rank["correct"], logits.argmax(-1) == targets)
    assert hidden.grad is not None and weight.grad is not None
    found = {"hidden": sum(rank["hidden"] for rank in ranks), "weight": torch.cat([rank["weight"] for rank in ranks])}
    for name, expected_grad in (("hidden", hidden.grad), ("weight", weight.grad)):
        tolerance = 1e-5 * float(expected_grad.abs().max())  # P13's, for FP32 against float64
        torch.testing.assert_close(found[name].double(), expected_grad, rtol=0, atol=tolerance)
    assert not found["weight"][REAL:].any()  # padding rows learn nothing


def check_nothing_scored() -> list[float]:
    """A microbatch of padding has no scored token: its gradients are zero, not missing."""
    from megalign.parallel.grid import create_grid
    from megalign.parallel.vocab import vocab_parallel_logprobs

    grid = create_grid()
    hidden, weight = torch.randn(0, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    logprobs, _ = vocab_parallel_logprobs(hidden, weight, torch.empty(0, dtype=torch.long), grid.tensor.group, REAL)
    logprobs.sum().backward()
    assert weight.grad is not None
    return [float(weight.grad.abs().max()), float(logprobs.sum())]


def test_a_microbatch_without_scored_tokens():
    assert run_ranks(check_nothing_scored, 1)[0] == [0.0, 0.0]

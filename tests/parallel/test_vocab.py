"""Vocabulary-parallel log-probabilities and entropy against torch's log_softmax, values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks

N, D, V, REAL = 37, 16, 24, 21  # three padding rows


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    return torch.randn(N, D) * 4, torch.randn(V, D), torch.randint(0, REAL, (N,)), torch.randn(N)


def check_logprobs(recompute: bool, kernels: bool = False) -> dict[str, Any]:
    """This rank's result and gradients; with chunks that do not divide N. kernels: those that CUDA takes, interpreted."""
    import torch.distributed as dist

    from megalign.kernels import logprob
    from megalign.parallel import vocab
    from megalign.parallel.grid import create_grid

    launched: list[str] = []
    if kernels:
        from megalign.kernels import logprob_triton

        launch = logprob_triton.launch
        logprob_triton.launch = lambda kernel, *given, **options: (launched.append(kernel.fn.__name__), launch(kernel, *given, **options))[1]
        logprob._backend = lambda hidden: logprob_triton
    logprob.CHUNK_ROWS, logprob.KEEP_BELOW = 10, 0 if recompute else 2**26
    grid = create_grid(tensor_model_parallel_size=dist.get_world_size())
    hidden, weight, targets, upstream = _inputs()
    mine = weight.chunk(grid.tensor.size)[grid.tensor.rank].clone().requires_grad_()
    results = {}
    for name, upstreams in (("logprobs", (upstream,)), ("entropy", (upstream, upstream.flip(0)))):
        hidden.grad = mine.grad = None
        hidden.requires_grad_()
        score = vocab.vocab_parallel_logprobs if name == "logprobs" else vocab.vocab_parallel_logprobs_and_entropy
        outputs = score(hidden, mine, targets, grid.tensor.group, REAL)
        torch.autograd.backward(outputs[: len(upstreams)], upstreams)
        results[name] = {"outputs": [output.detach() for output in outputs], "hidden": hidden.grad, "weight": mine.grad}
    assert launched == (["statistics_kernel", "logit_gradients_kernel"] * 2 if kernels else [])
    return results


@pytest.mark.parametrize("world, recompute, kernels", [(w, r, False) for w in (1, 2, 4) for r in (False, True)] + [(2, False, True)])
def test_logprobs_and_gradients_are_those_of_log_softmax(world: int, recompute: bool, kernels: bool):
    if kernels:
        pytest.importorskip("triton")
    hidden, weight, targets, upstream = _inputs()
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = (hidden @ weight.t())[:, :REAL]
    log_p = logits.log_softmax(-1)
    expected = {"logprobs": log_p.gather(-1, targets[:, None]).squeeze(-1), "entropy": -(log_p.exp() * log_p).sum(-1)}
    ranks = run_ranks(check_logprobs, world, recompute, kernels)
    for name, upstreams in (("logprobs", (upstream,)), ("entropy", (upstream, upstream.flip(0)))):
        hidden.grad = weight.grad = None
        torch.autograd.backward([expected["logprobs"], expected["entropy"]][: len(upstreams)], [u.double() for u in upstreams], retain_graph=True)
        for rank in ranks:
            *values, correct = rank[name]["outputs"]
            for value, of in zip(values, expected):
                torch.testing.assert_close(value.double(), expected[of].detach(), rtol=0, atol=2e-5)
            assert torch.equal(correct, logits.argmax(-1) == targets)
        assert hidden.grad is not None and weight.grad is not None
        found = {"hidden": sum(rank[name]["hidden"] for rank in ranks), "weight": torch.cat([rank[name]["weight"] for rank in ranks])}
        for part, expected_grad in (("hidden", hidden.grad), ("weight", weight.grad)):
            tolerance = 1e-5 * float(expected_grad.abs().max())  # P13's, for FP32 against float64
            torch.testing.assert_close(found[part].double(), expected_grad, rtol=0, atol=tolerance)
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

"""Chunked log-probabilities and entropy: float64 oracle, gradcheck, and the memory they need."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megalign.kernels import logprob
from megalign.kernels.logprob import Statistics, linear_logprobs, merged

N, D, V = 70, 90, 300


def inputs(dtype: torch.dtype = torch.float32, n: int = N, depth: int = D, vocabulary: int = V) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(n, depth, generator=generator), torch.randn(vocabulary, depth, generator=generator) / 4
    return hidden.to(dtype), weight.to(dtype), torch.randint(0, vocabulary, (n,), generator=generator)


def oracle(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    log_p = (hidden @ weight.t()).log_softmax(-1)
    return log_p.gather(-1, targets[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def gradients(score: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, upstreams: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    values = list(score(hidden, weight, targets))[: len(upstreams)]
    torch.autograd.backward(values, [u.to(v.dtype) for u, v in zip(upstreams, values)])
    assert hidden.grad is not None and weight.grad is not None
    return [v.detach() for v in values], [hidden.grad, weight.grad]


@pytest.mark.parametrize("keep", [0, 2**26])
@pytest.mark.parametrize("entropy", [False, True])
def test_gradcheck_in_float64(entropy: bool, keep: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(logprob, "KEEP_BELOW", keep)
    monkeypatch.setattr(logprob, "CHUNK_ROWS", 3)
    hidden, weight, targets = inputs(torch.float64, 7, 5, 11)
    found = linear_logprobs(hidden, weight, targets, entropy=entropy)
    for value, expected in zip(found, oracle(hidden, weight, targets) if entropy else oracle(hidden, weight, targets)[:1]):
        torch.testing.assert_close(value, expected, rtol=1e-13, atol=1e-13)
    torch.autograd.gradcheck(
        lambda h, w: linear_logprobs(h, w, targets, entropy=entropy)[: 2 if entropy else 1], (hidden.requires_grad_(), weight.requires_grad_()),
        nondet_tol=1e-12,  # a second backward computes again what the first one had kept
    )


def test_shards_merge_into_the_whole():
    """Statistics of uneven shards of the vocabulary, one of them empty, merged."""
    hidden, weight, targets = inputs(torch.float64)
    whole, _ = logprob._Torch.shard_statistics(hidden, weight, targets, entropy=True, keep=False)
    cuts = [0, 40, 40, 170, V]
    parts = [logprob._Torch.shard_statistics(hidden, weight[a:b], targets - a, entropy=True, keep=False)[0] for a, b in zip(cuts, cuts[1:])]
    for found, expected in zip(merged(Statistics(*(torch.stack(part) for part in zip(*parts)))), whole):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 300.0])
@pytest.mark.parametrize("keep", [0, 2**26])
def test_saturated_and_ordinary_logits(scale: float, keep: int, monkeypatch: pytest.MonkeyPatch):
    """Logits of thousands: probabilities underflow to zero, and nothing becomes NaN."""
    monkeypatch.setattr(logprob, "KEEP_BELOW", keep)
    hidden, weight, targets = inputs()
    hidden = hidden * scale
    upstreams = [torch.randn(N), torch.randn(N)]
    values, grads = gradients(lambda h, w, t: linear_logprobs(h, w, t, entropy=True), hidden, weight, targets, upstreams)
    expected, expected_grads = gradients(oracle, hidden.double(), weight.double(), targets, upstreams)
    largest = float((hidden @ weight.t()).abs().max())  # FP32 logits have an absolute error of its size
    for found, exact in zip(values, expected):
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-6 * largest)
    for found, exact in zip(grads, expected_grads):
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=(1e-5 if scale == 1 else 1e-4) * float(exact.abs().max()))


def test_rows_past_the_tokens_are_padding():
    hidden, weight, targets = inputs()
    targets = targets.clamp(max=259)
    values, (grad_hidden, grad_weight) = gradients(lambda h, w, t: linear_logprobs(h, w, t, rows=260), hidden, weight, targets, [torch.ones(N)])
    expected, (exact_hidden, exact_weight) = gradients(oracle, hidden, weight[:260], targets, [torch.ones(N)])
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close([grad_hidden, grad_weight[:260]], [exact_hidden, exact_weight])
    assert not grad_weight[260:].any()


def test_a_second_backward_gives_the_same_gradient():
    hidden, weight, targets = inputs()
    logprobs = linear_logprobs(hidden.requires_grad_(), weight, targets).logprobs
    (first,), (second,) = (torch.autograd.grad(logprobs.sum(), hidden, retain_graph=True) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)


def test_a_frozen_weight_gets_no_gradient():
    hidden, weight, targets = inputs()
    linear_logprobs(hidden.requires_grad_(), weight, targets).logprobs.sum().backward()
    assert weight.grad is None and hidden.grad is not None


def test_cuda_takes_the_kernels_and_fp64_the_formulas():
    """parallel/vocab.py and everything above it get the kernels on CUDA; the gradient probe is FP64, which they would cut to FP32."""
    from megalign.kernels import logprob_triton

    for cuda, dtype, expected in ((True, torch.bfloat16, logprob_triton), (True, torch.float64, logprob._Torch), (False, torch.bfloat16, logprob._Torch)):
        hidden: Any = SimpleNamespace(is_cuda=cuda, dtype=dtype)
        assert logprob._backend(hidden) is expected


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"hidden \(3, 4\), weight \(5, 6\) and targets \(3,\) must be"):
        linear_logprobs(torch.zeros(3, 4), torch.zeros(5, 6), torch.zeros(3, dtype=torch.long))


# --- memory ---------------------------------------------------------------------------------------------------------

MEASURE = """
import pathlib, sys, torch
from megalign.kernels.logprob import linear_logprobs
torch.set_num_threads(1)
tokens, depth, vocabulary = map(int, sys.argv[1:])
peak = lambda: int(pathlib.Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 2**20
small = torch.nn.Parameter(torch.randn(8, depth))
linear_logprobs(torch.randn(2, depth, requires_grad=True), small, torch.zeros(2, dtype=torch.long), entropy=True).logprobs.sum().backward()  # libraries are loaded
weight = torch.nn.Parameter(torch.empty(vocabulary, depth).normal_(std=depth**-.5))
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
before = peak()
hidden = torch.randn(tokens, depth, requires_grad=True)
found = linear_logprobs(hidden, weight, torch.randint(0, vocabulary, (tokens,)), entropy=True)
(found.logprobs.sum() + found.entropy.sum()).backward()
print(peak() - before - weight.nbytes / 2**30)  # less the gradient of the parameter
"""


def peak_gib(tokens: int, depth: int, vocabulary: int) -> float:
    """Growth of the peak of resident memory of a process of its own, above the weight and its gradient: hidden states and theirs included.

    Not ru_maxrss: on Linux a new process begins with that of the one that started it, and growth below is not seen.
    """
    command = [sys.executable, "-c", MEASURE, *map(str, (tokens, depth, vocabulary))]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, timeout=900).stdout)


GIGABYTE = 1e9 / 2**30  # what is asked for, in GiB


def test_a_long_vocabulary_fits_in_one_gigabyte():
    """2,048 tokens by 131,072 words would be 1 GiB of logits, 2 with their softmax; a chunk of them is 256 MiB, and two are needed."""
    assert peak_gib(2048, 16, 131072) < GIGABYTE


@pytest.mark.soak
def test_a_long_vocabulary_fits_in_one_gigabyte_at_full_width():
    assert peak_gib(8192, 1024, 131072) < GIGABYTE

"""The log-probability kernels, interpreted, against float64."""

from __future__ import annotations

from typing import Any

import ahead
import pytest
import torch
from exact_interpreter import record_launches
from test_logprob import N, V, gradients, inputs, oracle

from megalign.kernels import logprob, logprob_triton
from megalign.kernels.logprob import LogProbs, linear_logprobs


def triton_logprobs(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, **options: Any) -> LogProbs:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprob, "_backend", lambda _: logprob_triton)
        return linear_logprobs(hidden, weight, targets, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("splits", [1, 2])
def test_kernels_against_float64(dtype: torch.dtype, entropy: bool, splits: int, monkeypatch: pytest.MonkeyPatch):
    """Tails in all three dimensions; backward in chunks that do not divide N; one and several programs along the vocabulary."""
    n = 130 if splits == 1 else N
    hidden, weight, targets = inputs(dtype, n=n)
    targets[0] = V + 5  # of another shard: no target logit here
    monkeypatch.setattr(logprob_triton, "CHUNK_LOGITS", 128 * 304)
    monkeypatch.setattr(logprob_triton, "processors", lambda _: splits)
    upstreams = [torch.randn(n), torch.randn(n)][: 2 if entropy else 1]
    with record_launches() as launches:
        values, grads = gradients(lambda h, w, t: triton_logprobs(h, w, t, entropy=entropy), hidden, weight, targets, upstreams)
    assert [launch.kernel.split(":")[1] for launch in launches] == ["statistics_kernel"] + ["logit_gradients_kernel"] * (2 if splits == 1 else 1)

    def exact(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = h @ w.t()
        here = t < V
        own = logits.gather(-1, t.clamp(max=V - 1)[:, None]).squeeze(-1) * here
        return own - logits.logsumexp(-1), oracle(h, w, t.clamp(max=V - 1))[1]

    expected, expected_grads = gradients(exact, hidden.double(), weight.double(), targets, upstreams)
    for found, of in zip(values, expected):
        torch.testing.assert_close(found.double(), of, rtol=1e-5, atol=2e-5)
    bound = 1e-5 if dtype == torch.float32 else 2**-7  # gradients of logits are rounded to BF16 once, and so is the result
    for found, of in zip(grads, expected_grads):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), of, rtol=0, atol=bound * float(of.abs().max()))


def test_what_is_compiled_ahead_is_what_was_launched():
    with record_launches() as launches:
        for dtype in (torch.bfloat16, torch.float32):
            hidden, weight, targets = inputs(dtype, n=5)
            for entropy in (False, True):
                gradients(lambda h, w, t, entropy=entropy: triton_logprobs(h, w, t, entropy=entropy), hidden, weight, targets, [torch.ones(5)] * (1 + entropy))
    assert not ahead.unlaunched(ahead.load_cases("cases_logprob"), launches)


def test_kernels_with_an_empty_shard_or_no_tokens():
    hidden, weight, targets = inputs()
    found = triton_logprobs(hidden[:0], weight, targets[:0], entropy=True)
    assert found.logprobs.shape == (0,)
    own, _ = logprob_triton.shard_statistics(hidden, weight[:0], targets, entropy=True, keep=False)
    reference, _ = logprob._Torch.shard_statistics(hidden, weight[:0], targets, entropy=True, keep=False)
    assert all(torch.equal(a, b) for a, b in zip(own, reference))

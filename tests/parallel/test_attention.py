"""Core attention against its formula in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_ranks


def _attention() -> Any:
    from megatron.core.transformer.enums import AttnMaskType

    from megalign.parallel.attention import SdpaCoreAttention
    from megalign.parallel.grid import create_grid

    config: Any = SimpleNamespace(attention_dropout=0.0)
    return SdpaCoreAttention(config, 1, AttnMaskType.causal, "self", pg_collection=create_grid().process_groups)


def _packed(lengths: list[int]) -> Any:
    from megalign.parallel.context import packed_sequences

    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return packed_sequences(ends, max(lengths))


def _reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    from megalign.parallel.attention import attention_reference

    repeat = q.shape[1] // k.shape[1]
    return attention_reference(q, k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1), mask).float().flatten(1)


def check_attention() -> dict[str, float]:
    """Largest error of each use on one rank."""
    attention, errors = _attention(), {}
    torch.manual_seed(0)
    lengths, T, H, G, K, V = [5, 1, 10], 16, 6, 2, 8, 12
    q, k, v = torch.randn(T, H, K), torch.randn(T, G, K), torch.randn(T, G, V)
    document = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    causal = torch.ones(T, T).tril().bool()
    block = causal & (document[:, None] == document[None, :])
    errors["packed, grouped, K != V"] = _error(attention(q, k, v, None, packed_seq_params=_packed(lengths)), _reference(q, k, v, block))
    batched = [x.unsqueeze(1) for x in (q, k, v)]
    errors["causal"] = _error(attention(*batched, None)[:, 0], _reference(q, k, v, causal))
    hidden = torch.zeros(1, 1, T, T, dtype=torch.bool)
    hidden[..., :3] = True  # left padding: no query looks at the first three keys
    hidden[0, 0, :3, 0] = False
    errors["mask"] = _error(attention(*batched, hidden | ~causal)[:, 0], _reference(q, k, v, causal & ~hidden[0, 0]))
    # One new query against a cache of T keys sees all of them.
    from megatron.core.transformer.enums import AttnMaskType

    last = attention(batched[0][-1:], *batched[1:], None, attn_mask_type=AttnMaskType.no_mask)[0]
    errors["decode"] = _error(last, _reference(q, k, v, causal)[-1:])
    return errors


def check_context(lengths: list[int]) -> dict[str, Any]:
    """Output and gradients of this rank's part of packed documents, with its rows in the whole."""
    from megatron.core.transformer.enums import AttnMaskType

    from megalign.parallel.attention import SdpaCoreAttention
    from megalign.parallel.context import context_part
    from megalign.parallel.grid import create_grid

    grid = create_grid(context_parallel_size=2)
    config: Any = SimpleNamespace(attention_dropout=0.0)
    attention = SdpaCoreAttention(config, 1, AttnMaskType.causal, "self", pg_collection=grid.process_groups)
    packed, (q, k, v) = _packed(lengths), _inputs(sum(lengths))
    rows = context_part(torch.arange(sum(lengths)), packed.cu_seqlens_q, grid)
    parts = [x[rows].requires_grad_() for x in (q, k, v)]
    out = attention(*parts, None, packed_seq_params=packed)
    (out * _inputs(sum(lengths))[0][rows].flatten(1)).sum().backward()
    return {"rows": rows, "out": out.detach(), "grads": [x.grad for x in parts]}


def _inputs(T: int) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(T, 4, 8), torch.randn(T, 2, 8), torch.randn(T, 2, 8)]


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max())


def test_attention_is_the_formula():
    for use, error in run_ranks(check_attention, 1)[0].items():
        assert error < 2e-6, use


@pytest.mark.parametrize("lengths", [[16], [4, 8, 12]])
def test_context_parallel_attention_is_the_formula_and_its_gradient(lengths: list[int]):
    T = sum(lengths)
    q, k, v = (x.requires_grad_() for x in _inputs(T))
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = torch.ones(T, T).tril().bool() & (document[:, None] == document[None, :])
    expected = _reference(q, k, v, mask)
    (expected * q.detach().flatten(1)).sum().backward()
    seen = []
    for part in run_ranks(check_context, 2, lengths):
        rows = part["rows"]
        seen += rows.tolist()
        torch.testing.assert_close(part["out"], expected[rows], rtol=0, atol=2e-6)
        for grad, whole in zip(part["grads"], (q.grad, k.grad, v.grad), strict=True):
            assert whole is not None
            torch.testing.assert_close(grad, whole[rows], rtol=0, atol=5e-6)
    assert sorted(seen) == list(range(T))

"""Attention over packed sequences: the choice of kernel, how each is called, and that no mask grows with T x T."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megalign.parallel import varlen
from megalign.parallel.attention import attention_reference
from megalign.parallel.varlen import attend, by_document, choose_kernel

BF16 = torch.bfloat16


@pytest.mark.parametrize(
    "device, dtype, head, dropout, modules, kernel",
    [
        ("cuda", BF16, 128, 0.0, {"torch.nn.attention.varlen", "flash_attn"}, "varlen"),
        ("cuda", torch.float16, 256, 0.0, {"torch.nn.attention.varlen"}, "varlen"),
        ("cuda", BF16, 128, 0.0, {"flash_attn"}, "flash_attn"),  # torch 2.9
        ("cuda", BF16, 128, 0.1, {"torch.nn.attention.varlen", "flash_attn"}, "flash_attn"),  # torch's kernel has no dropout
        ("cuda", BF16, 128, 0.1, {"torch.nn.attention.varlen"}, "documents"),
        ("cuda", torch.float32, 128, 0.0, {"torch.nn.attention.varlen", "flash_attn"}, "documents"),
        ("cuda", BF16, 320, 0.0, {"torch.nn.attention.varlen", "flash_attn"}, "documents"),
        ("cuda", BF16, 128, 0.0, set(), "documents"),
        ("cpu", BF16, 128, 0.0, {"torch.nn.attention.varlen", "flash_attn"}, "documents"),
    ],
)
def test_the_choice_of_kernel(device: str, dtype: torch.dtype, head: int, dropout: float, modules: set[str], kernel: str) -> None:
    assert choose_kernel(device, dtype, head, dropout, modules.__contains__) == kernel


def test_what_is_installed_is_looked_for() -> None:
    assert varlen._installed("torch.nn.attention") and not varlen._installed("flash_attn_of_nobody.nowhere")


SEGMENTS = ([5, 1, 7, 300], [5, 4, 20, 700])  # queries, keys: a whole document, and ends of longer ones


def inputs(queries: list[int], keys: list[int], heads: int = 4, groups: int = 2, key: int = 8, value: int = 12) -> Any:
    numbers = torch.Generator().manual_seed(3)
    shapes = ((sum(queries), heads, key), (sum(keys), groups, key), (sum(keys), groups, value))
    return [torch.randn(shape, generator=numbers, requires_grad=True) for shape in shapes]


def formula(q: Tensor, k: Tensor, v: Tensor, queries: list[int], keys: list[int], scale: float | None) -> Tensor:
    """Masked softmax in float64; query i of n stands at position (keys - n + i)."""
    repeats = q.shape[1] // k.shape[1]
    outs = []
    for of_q, of_k, of_v in zip(q.split(queries), k.split(keys), v.split(keys)):
        n, m = len(of_q), len(of_k)
        mask = torch.arange(m)[None] <= torch.arange(m - n, m)[:, None]
        outs.append(attention_reference(of_q, of_k.repeat_interleave(repeats, 1), of_v.repeat_interleave(repeats, 1), mask, scale))
    return torch.cat(outs)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_blocks_are_the_formula_with_its_gradients(scale: float | None) -> None:
    found, expected = inputs(*SEGMENTS), inputs(*SEGMENTS)
    queries, keys = SEGMENTS
    out = by_document(found[0], found[1], found[2], queries, keys, causal=True, scale=scale, dropout=0.0)
    whole = formula(expected[0], expected[1], expected[2], queries, keys, scale)
    torch.testing.assert_close(out, whole.float(), rtol=0, atol=2e-6)
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    (out * weights).sum().backward()
    (whole * weights).sum().backward()
    for one, other in zip(found, expected):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=float(1e-5 * other.grad.abs().max()))


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("queries, keys", [([4096], [4096]), ([1024, 1024], [2048, 4096]), ([2048, 2048], [2048, 2048])])
def test_no_tensor_is_as_large_as_queries_times_keys(queries: list[int], keys: list[int]) -> None:
    """A document, the two chunks of a rank of two under context parallelism, and two documents of a packed row."""
    q, k, v = inputs(queries, keys, heads=2, groups=2, key=4, value=4)
    with Largest() as largest:
        by_document(q, k, v, queries, keys, causal=True, scale=None, dropout=0.0).sum().backward()
    allowed = max(varlen.BLOCK * max(keys), *(x.numel() for x in (q, k, v)))
    assert largest.numel <= allowed < sum(queries) * max(keys) / 2


def of_segments(q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, causal: bool, scale: float, repeats: bool) -> Tensor:
    """What FlashAttention's variable-length kernels compute, and what they insist on."""
    assert ends_q.dtype == ends_k.dtype == torch.int32 and q.shape[-1] == k.shape[-1] == v.shape[-1] and causal
    assert repeats or q.shape[1] == k.shape[1]
    queries, keys = ends_q.diff().tolist(), ends_k.diff().tolist()
    return formula(q, k, v, queries, keys, scale).to(q.dtype)


def torch_2_10(query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, is_causal: bool = False) -> Tensor:
    return of_segments(query, key, value, cu_seq_q, cu_seq_k, is_causal, query.shape[-1] ** -0.5, False)


def torch_2_11(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    return of_segments(query, key, value, cu_seq_q, cu_seq_k, window_size == (-1, 0), scale or query.shape[-1] ** -0.5, False)


def torch_2_12(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    return of_segments(query, key, value, cu_seq_q, cu_seq_k, window_size == (-1, 0), scale or query.shape[-1] ** -0.5, enable_gqa)


def flash_attn(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
) -> Tensor:  # fmt: skip
    assert (max_seqlen_q, max_seqlen_k) == (max(cu_seqlens_q.diff()), max(cu_seqlens_k.diff())) and dropout_p == 0.25
    return of_segments(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, softmax_scale or q.shape[-1] ** -0.5, True)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("value", [8, 12, 5])
@pytest.mark.parametrize("kernel", [torch_2_10, torch_2_11, torch_2_12, flash_attn])
def test_each_kernel_gets_what_it_takes(monkeypatch: pytest.MonkeyPatch, kernel: Any, value: int, scale: float | None) -> None:
    """The kernels themselves need CUDA (tests/gpu); here one that has the signature of each version, on the formula."""
    name, function = ("flash_attn", "flash_attn_varlen_func") if kernel is flash_attn else ("torch.nn.attention.varlen", "varlen_attn")
    module = ModuleType(name)
    setattr(module, function, kernel)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(varlen, "choose_kernel", lambda *_: "flash_attn" if kernel is flash_attn else "varlen")
    q, k, v = inputs(*SEGMENTS, value=value)
    found = attend(q, k, v, *SEGMENTS, causal=True, scale=scale, dropout=0.25 if kernel is flash_attn else 0.0)
    torch.testing.assert_close(found, formula(q, k, v, *SEGMENTS, scale).float(), rtol=0, atol=2e-6)

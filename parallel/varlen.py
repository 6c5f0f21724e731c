"""Attention over packed sequences without a T x T mask: which kernel, and how each is called.

    varlen      torch.nn.attention.varlen (torch 2.10 and later): one FlashAttention kernel for all documents
    flash_attn  the package of that name: the same kernel, also for older torch, and with dropout
    documents   scaled_dot_product_attention, once a document; a causal block of a longer sequence a few hundred queries
                at a time, so that no mask is larger than that times the keys

The two kernels need CUDA, BF16 or FP16, and heads of at most 256. Queries of a segment are the LAST of its keys: query
i of q sees keys up to i + (k - q), FlashAttention's convention (2.1 and later); with q = k that is plain causality.

# T queries and T' keys of all segments, H query heads, G key/value heads, K key size, V value size
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Kernel = Literal["varlen", "flash_attn", "documents"]
LARGEST_HEAD = 256
BLOCK = 256  # queries of a block: its mask has this many rows


def choose_kernel(device: str, dtype: torch.dtype, head_size: int, dropout: float, installed: Callable[[str], bool] | None = None) -> Kernel:
    """The fastest kernel that can do it. head_size: the larger of key and value. installed: whether a module exists."""
    installed = installed or _installed
    if device != "cuda" or dtype not in (torch.bfloat16, torch.float16) or head_size > LARGEST_HEAD:
        return "documents"
    if dropout == 0.0 and installed("torch.nn.attention.varlen"):
        return "varlen"
    return "flash_attn" if installed("flash_attn") else "documents"


def attend(
    q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, queries: Sequence[int], keys: Sequence[int], *, causal: bool, scale: float | None, dropout: float
) -> Tensor:
    """[T, H, V]: each segment's queries over its keys. queries, keys: lengths of the segments."""
    kernel = choose_kernel(q_THK.device.type, q_THK.dtype, max(q_THK.shape[-1], v_TGV.shape[-1]), dropout)
    if kernel == "documents":
        return by_document(q_THK, k_TGK, v_TGV, queries, keys, causal=causal, scale=scale, dropout=dropout)
    factor: float = scale or q_THK.shape[-1] ** -0.5
    size = v_TGV.shape[-1]
    q, k, v = _one_size(q_THK, k_TGK, v_TGV)
    ends = [torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(q.device) for lengths in (queries, keys)]
    call = _torch_kernel if kernel == "varlen" else _package_kernel
    return call(q, k, v, ends, (max(queries), max(keys)), causal, factor, dropout)[..., :size]


def by_document(
    q: Tensor, k: Tensor, v: Tensor, queries: Sequence[int], keys: Sequence[int], *, causal: bool, scale: float | None, dropout: float
) -> Tensor:
    """`attend` by scaled_dot_product_attention, segment after segment."""
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # [H, T, K]
    outs = []
    for of_q, of_k, of_v in zip(q.split(list(queries), 1), k.split(list(keys), 1), v.split(list(keys), 1), strict=True):
        count, seen = of_q.shape[1], of_k.shape[1]
        if not causal or count == seen:
            outs.append(_sdpa(of_q, of_k, of_v, None, causal, scale, dropout))
            continue
        for start in range(0, count, BLOCK):
            block = of_q[:, start : start + BLOCK]
            first = seen - count + start  # position of its first query among the keys
            until = first + block.shape[1]
            positions = torch.arange(first, until, device=q.device)
            mask = torch.arange(until, device=q.device) <= positions[:, None]
            outs.append(_sdpa(block, of_k[:, :until], of_v[:, :until], mask, False, scale, dropout))
    return torch.cat(outs, 1).transpose(0, 1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None, dropout: float) -> Tensor:
    q, k, v = (x.unsqueeze(0) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale)[0]


def _torch_kernel(q: Tensor, k: Tensor, v: Tensor, ends: list[Tensor], longest: tuple[int, int], causal: bool, scale: float, dropout: float) -> Tensor:
    """Its arguments have grown: `is_causal` in 2.10 became `window_size` in 2.11, with `scale`; `enable_gqa` came in 2.12."""
    kernel: Any = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    known = inspect.signature(kernel).parameters
    options: dict[str, Any] = {"window_size": (-1, 0) if causal else (-1, -1)} if "window_size" in known else {"is_causal": causal}
    if "scale" in known:
        options["scale"] = scale
    else:
        q = q * (scale * q.shape[-1] ** 0.5)  # the kernel divides by the root of the (padded) head size
    if (repeats := q.shape[1] // k.shape[1]) > 1:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    return kernel(q, k, v, *ends, *longest, **options)


def _package_kernel(q: Tensor, k: Tensor, v: Tensor, ends: list[Tensor], longest: tuple[int, int], causal: bool, scale: float, dropout: float) -> Tensor:
    kernel: Any = importlib.import_module("flash_attn").flash_attn_varlen_func
    return kernel(q, k, v, *ends, *longest, dropout_p=dropout, softmax_scale=scale, causal=causal)


def _one_size(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros behind the shorter of key and value (latent attention's differ): they add nothing to a score, and are cut off."""
    size = max(q.shape[-1], v.shape[-1])
    return F.pad(q, (0, size - q.shape[-1])), F.pad(k, (0, size - k.shape[-1])), F.pad(v, (0, size - v.shape[-1]))


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False

"""Core attention on torch's scaled_dot_product_attention, for the layer spec that needs no Transformer Engine.

One module serves training and generation: grouped queries, a value size other than the key size, packed
sequences (`thd`: every document attends only to itself), a key/value cache (the mask then says what a
query may see), and context parallelism.

# S positions, B sequences, T packed tokens, H query heads, G key/value heads, K key size, V value size
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megalign.parallel.context import SharedPrefixes, gather_runs
from megalign.parallel.varlen import attend


class SdpaCoreAttention(MegatronModule):
    """softmax(q k' / sqrt(K) + mask) v, per head (Vaswani et al. 2017, eq. 1).

    Under context parallelism each rank holds chunks r and 2C-1-r of the 2C chunks of every document
    (megatron's balanced order); keys and values are gathered over the group and put back in order, and
    the gather's backward reduce-scatters their gradients.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ):
        super().__init__(config)
        self.layer_number = layer_number
        self.is_causal = attn_mask_type == AttnMaskType.causal
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale
        self.context_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query [S, B, H, K], key [S', B, G, K], value [S', B, G, V] -> [S, B, H * V]; packed: without B.

        attention_mask: bool, broadcastable to [B, 1, S, S'], True where a query must NOT look. Without it
        attention is causal, or full when attn_mask_type says so.
        """
        if attention_bias is not None:
            raise ValueError("attention_bias is not supported by SdpaCoreAttention; use RoPE or the TE layer spec")
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params)
        causal = self.is_causal if attn_mask_type is None else attn_mask_type == AttnMaskType.causal
        if self.context_group.size() > 1:
            whole = torch.tensor([0, query.shape[0] * self.context_group.size()])
            columns = [self._packed_with_context(query[:, b], key[:, b], value[:, b], whole) for b in range(query.shape[1])]
            return torch.stack(columns, dim=1)
        if attention_mask is not None:
            out = self._attend(query, key, value, mask=~attention_mask)
        else:
            out = self._attend(query, key, value, causal=causal and query.shape[0] > 1)
        return out.flatten(2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """[S, B, H, K] -> [S, B, H, V]."""
        repeats = query.shape[2] // key.shape[2]
        if repeats > 1:
            key, value = (x.repeat_interleave(repeats, dim=2) for x in (key, value))
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=self.scale)
        return out.permute(2, 0, 1, 3)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams) -> Tensor:
        """Documents one after the other, each causal in itself: [T, H, K] -> [T, H * V]."""
        ends = packed.cu_seqlens_q_padded if packed.cu_seqlens_q_padded is not None else packed.cu_seqlens_q
        if self.context_group.size() > 1:
            return self._packed_with_context(query, key, value, ends)
        lengths = (ends[1:] - ends[:-1]).tolist()
        if isinstance(packed, SharedPrefixes):
            return self._segments(query, gather_runs(key, packed.runs), gather_runs(value, packed.runs), lengths, packed.keys)
        return self._segments(query, key, value, lengths, lengths)

    def _packed_with_context(self, query: Tensor, key: Tensor, value: Tensor, ends: Tensor) -> Tensor:
        """This rank's two chunks of every document, each over the keys of that document up to its own end.

        Chunks r and 2C-1-r of 2C see r + 1 and 2C - r chunks of keys: 2C + 1 on every rank, so the work is even.
        """
        ranks, rank = self.context_group.size(), self.context_group.rank()
        local = [int(n) // ranks for n in (ends[1:] - ends[:-1]).tolist()]
        stride, halves = query.shape[0], [n // 2 for n in local]
        rows, start = [], 0
        for n, half in zip(local, halves, strict=True):
            # Rank r holds chunks r and 2C-1-r; chunk c therefore lies at rank min(c, 2C-1-c).
            places = [(c, 0) if c < ranks else (2 * ranks - 1 - c, half) for c in range(2 * ranks)]
            chunks = [torch.arange(r * stride + start + at, r * stride + start + at + half) for r, at in places]
            rows += [*chunks[: rank + 1], *chunks[: 2 * ranks - rank]] if self.is_causal else chunks * 2
            start += n
        queries = [half for half in halves for _ in range(2)]
        seen = (rank + 1, 2 * ranks - rank) if self.is_causal else (2 * ranks, 2 * ranks)
        keys = [half * chunks for half in halves for chunks in seen]
        wanted = torch.cat(rows).to(query.device)
        return self._segments(query, self._gather(key)[wanted], self._gather(value)[wanted], queries, keys)

    def _segments(self, query: Tensor, key: Tensor, value: Tensor, queries: list[int], keys: list[int]) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return attend(query, key, value, queries, keys, causal=self.is_causal, scale=self.scale, dropout=dropout).flatten(1)

    def _gather(self, x: Tensor) -> Tensor:
        return gather_from_sequence_parallel_region(x.contiguous(), tensor_parallel_output_grad=True, group=self.context_group)


def attention_reference(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """The formula itself, in float64, for tests: query [S, H, K], key [S', H, K], value [S', H, V], mask [S, S'] True = see."""
    scores = torch.einsum("shk,thk->hst", query.double(), key.double()) * (scale or 1 / math.sqrt(query.shape[-1]))
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("hst,thv->shv", weights, value.double())

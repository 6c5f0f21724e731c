"""A weight conversion is a table: one row for each kind of weight, read in both directions.

A row names a Megatron weight, the Hugging Face weights it is made of and their shapes; its class says how
several become one. `{layer}` and `{expert}` run over the model's global numbers; in Hugging Face files prediction
modules are layers behind the last, and `{depth}` is their number from 0. Tensors are full here,
never shards (`shards.py` cuts them), and only moved, so a round trip is bitwise.

Shapes: V vocabulary, N learned positions, D hidden, M = 2 D, d head size, Q = heads * d query rows, K = groups * d key (or
value) rows, T = Q + 2 K, F width of the dense MLP, E experts, I width of one expert, S of the shared expert.
Multi-latent attention: R rank of the queries' latent, L of the keys' and values', C = L and the shared rotary key,
P query rows made from the latent, p query rows made directly, U rows of keys and values, O rows of all value heads.
A size of 0 says that the model has no such weight: the row is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megalign.config.layout import layers_with_experts
from megalign.config.schema import ModelConfig

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"


class ConversionError(ValueError):
    """A checkpoint or model that the tables cannot convert without loss; the message names what and why."""


@dataclass(frozen=True)
class Dimensions:
    """The sizes that shapes are made of; `padded_vocab_size` counts the rows that Megatron keeps."""

    num_layers: int
    num_query_groups: int
    num_experts: int  # 0: a dense model
    vocab_size: int
    padded_vocab_size: int
    tied: bool
    has_experts: tuple[bool, ...]  # of each layer
    sizes: Mapping[str, int]  # of the letters in the module's docstring
    mtp_layers: int = 0  # prediction modules

    @classmethod
    def of(cls, model: ModelConfig, vocab_size: int, padded_vocab_size: int | None = None) -> Dimensions:
        """Those of `model`. Raises ConversionError when the padded vocabulary is smaller than the real one."""
        padded = padded_vocab_size or vocab_size
        if padded < vocab_size:
            raise ConversionError(f"padded_vocab_size is {padded}: it must be at least vocab_size = {vocab_size}")
        heads = model.num_attention_heads
        groups = model.num_query_groups or heads
        head_size = model.kv_channels or model.hidden_size // heads
        experts = model.num_moe_experts or 0
        sizes = {"V": vocab_size, "D": model.hidden_size, "d": head_size, "Q": heads * head_size, "K": groups * head_size}
        sizes |= {"F": model.ffn_hidden_size, "E": experts, "I": model.moe_ffn_hidden_size or model.ffn_hidden_size}
        sizes |= {"S": model.moe_shared_expert_intermediate_size or 0, "N": model.max_position_embeddings}
        sizes["M"] = 2 * model.hidden_size
        sizes["T"] = sizes["Q"] + 2 * sizes["K"]
        query_rows, rank = heads * (model.qk_head_dim + model.qk_pos_emb_head_dim), model.q_lora_rank or 0
        sizes |= {"R": rank, "P": query_rows if rank else 0, "p": 0 if rank else query_rows}
        sizes |= {"L": model.kv_lora_rank, "C": model.kv_lora_rank + model.qk_pos_emb_head_dim}
        sizes |= {"U": heads * (model.qk_head_dim + model.v_head_dim), "O": heads * model.v_head_dim}
        tied = model.share_embeddings_and_output_weights
        return cls(model.num_layers, groups, experts, vocab_size, padded, tied, tuple(layers_with_experts(model)), sizes, model.mtp_num_layers or 0)

    def layers(self, kind: str) -> list[int]:
        """Numbers of the layers of a `kind`: "all", "dense", "experts", or "mtp", which follow the last."""
        if kind == "mtp":
            return list(range(self.num_layers, self.num_layers + self.mtp_layers))
        wanted = {"all": (True, False), "dense": (False,), "experts": (True,)}[kind]
        return [layer for layer, experts in enumerate(self.has_experts) if experts in wanted]

    def shape(self, letters: str) -> tuple[int, ...]:
        return tuple(self.sizes[letter] for letter in letters)


@dataclass(frozen=True)
class Row:
    """One Megatron weight and the Hugging Face weights it is made of, each with its shape in letters."""

    megatron: str
    hf: Mapping[str, str]
    layers: Literal["all", "dense", "experts", "mtp"] = "all"  # which layers have it

    def part_shapes(self, dims: Dimensions) -> list[tuple[int, ...]]:
        return [dims.shape(letters) for letters in self.hf.values()]

    def whole_shape(self, dims: Dimensions) -> tuple[int, ...]:
        parts = self.part_shapes(dims)
        return (sum(part[0] for part in parts), *parts[0][1:])

    def merge(self, parts: list[Tensor], dims: Dimensions) -> Tensor:
        raise NotImplementedError

    def split(self, whole: Tensor, dims: Dimensions) -> list[Tensor]:
        raise NotImplementedError


class Copy(Row):
    """The same tensor under another name."""

    def merge(self, parts: list[Tensor], dims: Dimensions) -> Tensor:
        return parts[0]

    def split(self, whole: Tensor, dims: Dimensions) -> list[Tensor]:
        return [whole]


class PadVocab(Row):
    """Megatron's vocabulary has extra rows so that tensor parallelism divides it: zeros in, cut off out."""

    def whole_shape(self, dims: Dimensions) -> tuple[int, ...]:
        return (dims.padded_vocab_size, dims.sizes["D"])

    def merge(self, parts: list[Tensor], dims: Dimensions) -> Tensor:
        padding_rows = dims.padded_vocab_size - dims.vocab_size
        return torch.nn.functional.pad(parts[0], (0, 0, 0, padding_rows)) if padding_rows else parts[0]

    def split(self, whole: Tensor, dims: Dimensions) -> list[Tensor]:
        return [whole[: dims.vocab_size]]


class MergeQKV(Row):
    """Query, key and value interleaved by group: for each group its query heads, its key head, its value head.

    A contiguous cut of the rows is then a set of whole groups, which is what tensor parallelism takes.
    """

    def merge(self, parts: list[Tensor], dims: Dimensions) -> Tensor:
        groups = dims.num_query_groups
        by_group = [part.reshape(groups, part.shape[0] // groups, *part.shape[1:]) for part in parts]
        return torch.cat(by_group, dim=1).flatten(0, 1)

    def split(self, whole: Tensor, dims: Dimensions) -> list[Tensor]:
        groups = dims.num_query_groups
        rows = [part[0] // groups for part in self.part_shapes(dims)]
        by_group = whole.reshape(groups, sum(rows), *whole.shape[1:]).split(rows, dim=1)
        return [part.flatten(0, 1) for part in by_group]


class Transposed(Row):
    """[in, out] there, [out, in] here."""

    def whole_shape(self, dims: Dimensions) -> tuple[int, ...]:
        return tuple(reversed(self.part_shapes(dims)[0]))

    def merge(self, parts: list[Tensor], dims: Dimensions) -> Tensor:
        return parts[0].t().contiguous()

    def split(self, whole: Tensor, dims: Dimensions) -> list[Tensor]:
        return [whole.t().contiguous()]


class TransposedQKV(Row):
    """Query, key and value side by side in one [in, out] weight or bias; interleaved by group here, like `MergeQKV`."""

    def whole_shape(self, dims: Dimensions) -> tuple[int, ...]:
        return tuple(reversed(self.part_shapes(dims)[0]))

    def merge(self, parts: list[Tensor], dims: Dimensions) -> Tensor:
        rows = [dims.sizes["Q"], dims.sizes["K"], dims.sizes["K"]]
        return _GROUPS.merge(list(parts[0].t().split(rows)), dims)

    def split(self, whole: Tensor, dims: Dimensions) -> list[Tensor]:
        return [torch.cat(_GROUPS.split(whole, dims)).t().contiguous()]


_GROUPS = MergeQKV("", {"query": "Q", "key": "K", "value": "K"})  # the interleaving alone


class MergeGateUp(Row):
    """SwiGLU's two input projections, all gate rows and then all up rows."""

    def merge(self, parts: list[Tensor], dims: Dimensions) -> Tensor:
        return torch.cat(parts)

    def split(self, whole: Tensor, dims: Dimensions) -> list[Tensor]:
        return list(whole.chunk(2))


def under(megatron: str, hf: str, *rows: Row) -> tuple[Row, ...]:
    """`rows` with both sides' names prefixed."""
    return tuple(replace(row, megatron=megatron + row.megatron, hf={hf + name: s for name, s in row.hf.items()}) for row in rows)


def only(layers: Literal["dense", "experts"], rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """`rows` of those layers alone, in a model that has both kinds."""
    return tuple(replace(row, layers=layers) for row in rows)


def ahead(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """`rows` of a decoder layer, as those of the layer inside each prediction module."""
    inside = {row.megatron: row.megatron.replace("decoder.layers.{layer}.", "mtp.layers.{depth}.transformer_layer.") for row in rows}
    return tuple(replace(row, megatron=inside[row.megatron], layers="mtp") for row in rows)

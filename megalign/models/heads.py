"""Reward models: a transformer whose last stage reads numbers off its hidden states instead of saying words.

# T tokens, N marked positions, D model, H numbers that all heads give together

A head is `values = hidden W^T + b`, FP32 whatever the model's dtype. Every tensor rank has the whole of it. Under sequence
parallelism a rank reads the positions that it holds, so that [N, H] numbers and not [T, D] states travel; its gradient is
then a part of the head's, and the sum over tensor ranks the whole: `declare(..., tensor="sequence")`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import linear, pad

from megalign.models.gpt import DialogueModel
from megalign.parallel.placement import declare

PREFIX = "heads."
HF_HEAD = "score.weight"  # of transformers' ...ForSequenceClassification


@dataclass(frozen=True)
class HeadShape:
    """Sizes of a head."""

    outputs: int  # rows of W
    bias: bool
    constants: int = 0  # learned numbers that are the same for every document: thresholds, the shape of a distribution

    @property
    def width(self) -> int:
        """Numbers a document."""
        return self.outputs + self.constants


class Head(torch.nn.Module):
    """One linear read-out."""

    bias: Parameter | None
    constants: Parameter | None

    def __init__(self, hidden_size: int, shape: HeadShape, dtype: torch.dtype):
        super().__init__()
        self.weight = declare(Parameter(torch.empty(shape.outputs, hidden_size, dtype=dtype)), tensor="sequence")
        for name, size in (("bias", shape.outputs if shape.bias else 0), ("constants", shape.constants)):
            self.register_parameter(name, declare(Parameter(torch.empty(size, dtype=dtype)), tensor="sequence") if size else None)

    def forward(self, hidden_ND: Tensor) -> Tensor:
        """[N, width], FP32 (FP64 of FP64)."""
        exact = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        bias, constants = (None if p is None else p.to(exact) for p in (self.bias, self.constants))
        values = linear(hidden_ND.to(exact), self.weight.to(exact), bias)
        return values if constants is None else torch.cat([values, constants.expand(len(values), -1)], -1)


class RewardModel(DialogueModel):
    """A decoder-only transformer with heads in the place of the output layer.

    Returns [N, H]: what the heads say at the N positions that `loss_mask` marks, in order, heads in the order of `shapes`.
    """

    def __init__(self, *args: Any, shapes: Mapping[str, HeadShape], **kwargs: Any):
        """shapes: name of each head -> its sizes."""
        super().__init__(*args, **{**kwargs, "share_embeddings_and_output_weights": False})
        self.shapes = dict(shapes)
        if self.post_process:
            del self.output_layer  # it would be saved, and decayed, and never used
            heads = {f"{name}_head": Head(self.config.hidden_size, shape, self.config.params_dtype) for name, shape in shapes.items()}
            self.heads = torch.nn.ModuleDict(heads)

    def _postprocess(self, hidden_states: Tensor, *args: Any, loss_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if not self.post_process:
            return hidden_states
        assert loss_mask is not None
        marked = loss_mask.flatten()
        own = self._own_part(loss_mask).flatten().nonzero().squeeze(-1)
        hidden_TD = hidden_states.transpose(0, 1).reshape(-1, hidden_states.shape[-1])
        values_NH = torch.cat([head(hidden_TD[own]) for head in self.heads.values()], -1)
        if not self.config.sequence_parallel:
            return values_NH  # every tensor rank has all positions
        before = int(marked[: len(hidden_TD) * self.pg_collection.tp.rank()].sum())
        whole = pad(values_NH, (0, 0, before, int(marked.sum()) - before - len(own)))
        # Backward: the identity. Every rank has the gradient of all values, and keeps that of its own.
        return reduce_from_tensor_model_parallel_region(whole, group=self.pg_collection.tp)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """Without what megatron-core does to an output layer (language_module.py:300)."""
        return MegatronModule.sharded_state_dict(self, prefix, sharded_offsets, metadata)


def is_head(name: str) -> bool:
    """Whether a parameter of this global name belongs to a head."""
    return name.startswith(PREFIX)


def initial_head(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A head before training: W normal with standard deviation 1 / sqrt(D + 1) (arXiv:1909.08593), b 0.

    Constants: `ordered_thresholds` one apart around 0; a single one 0.
    """
    if name.endswith(".weight"):
        return torch.empty(shape).normal_(0, 1 / math.sqrt(shape[-1] + 1), generator=generator)
    start = torch.zeros(shape)
    if name.endswith(".constants"):
        start[0], start[1:] = -(shape[0] - 1) / 2, math.log(math.e - 1)  # softplus of it is 1
    return start

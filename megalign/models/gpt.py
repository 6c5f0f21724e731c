"""Megatron-core's GPT, whose last stage returns log-probabilities of the scored tokens instead of all logits."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megalign.parallel.vocab import vocab_parallel_logprobs


class DialogueModel(GPTModel):
    """A decoder-only transformer; `labels` and `loss_mask` turn its output into log-probabilities.

    Training: returns [2, N]: log-probability of each of the N scored tokens (FP32), in order, and 1.0 where
    the token was also the most probable. The output layer runs on those N positions alone.
    Without labels: logits, as megatron-core returns them.
    """

    def __init__(self, *args: Any, real_vocab_size: int, **kwargs: Any):
        """real_vocab_size: rows of the tables that stand for tokens; the rest is padding."""
        super().__init__(*args, **kwargs)
        self.real_vocab_size = real_vocab_size

    def bfloat16(self) -> DialogueModel:
        """BF16, except for the routers' expert biases and counts: a step changes a bias by less than BF16 can say,
        and a BF16 count stops growing at 256. (Upstream keeps the bias, once rounded, and not the count: router.py:209.)"""
        kept = {name: buffer for name, buffer in self.named_buffers() if name.endswith((".expert_bias", ".local_tokens_per_expert"))}
        super().bfloat16()
        for name, buffer in kept.items():
            module, _, own_name = name.rpartition(".")
            setattr(self.get_submodule(module), own_name, buffer)
        return self

    def forward(self, *args: Any, padding_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """megatron-core's forward. padding_mask [B, S]: True where the routers' auxiliary losses must not look."""
        if self.config.num_moe_experts is None:
            padding_mask = None
        elif padding_mask is not None and self.config.sequence_parallel and not self.pre_process:
            # megatron-core (gpt_model.py:314) cuts the mask to this rank's part of the sequence on the first stage only.
            padding_mask = padding_mask.chunk(self.pg_collection.tp.size(), dim=1)[self.pg_collection.tp.rank()]
        return super().forward(*args, padding_mask=padding_mask, **kwargs)

    def _postprocess(self, hidden_states: Tensor, *args: Any, labels: Tensor | None = None, loss_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states, *args, labels=None, loss_mask=loss_mask, **kwargs)
        mask = torch.ones_like(labels, dtype=torch.bool) if loss_mask is None else loss_mask
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            # Backward: reduce-scatter. Each rank's gradient is that of its own part of the vocabulary.
            hidden = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=True, group=group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden_states, group=group)
        scored = mask.flatten().nonzero().squeeze(-1)
        # [S, B, D] with B = 1 for packed rows; [B, S] labels follow the same order after the transpose.
        hidden_TD = hidden.transpose(0, 1).reshape(-1, hidden.shape[-1])[scored]
        weight: Any = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else self.output_layer.weight
        logprobs, correct = vocab_parallel_logprobs(hidden_TD, weight, labels.flatten()[scored], group, self.real_vocab_size)
        return torch.stack([logprobs, correct.float()])

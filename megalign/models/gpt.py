"""Megatron-core's GPT, whose last stage returns log-probabilities of the scored tokens instead of all logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megalign.batch import Ahead
from megalign.parallel.context import SharedPrefixes
from megalign.parallel.vocab import vocab_parallel_logprobs


class DialogueModel(GPTModel):
    """A decoder-only transformer; `labels` and `loss_mask` turn its output into log-probabilities.

    Training: returns [2, N]: log-probability of each of the N scored tokens (FP32), in order, and 1.0 where
    the token was also the most probable. The output layer runs on those N positions alone.
    Without labels: logits, as megatron-core returns them.

    With `ahead`, one entry a prediction module, a list: the above, and the same of every module on the labels ahead.
    megatron-core would add their loss itself (gpt_model.py:560): logits of all positions, padding rows of the table in
    the softmax, and each microbatch divided by its own count of tokens. So modules are run here, on the scored
    positions, and the trainer divides by the count of the global batch. Without `ahead` they are not run at all.
    """

    def __init__(self, *args: Any, real_vocab_size: int, **kwargs: Any):
        """real_vocab_size: rows of the tables that stand for tokens; the rest is padding."""
        super().__init__(*args, **kwargs)
        self.real_vocab_size = real_vocab_size
        self._ahead: Sequence[Ahead] = ()
        self._head: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    def bfloat16(self) -> DialogueModel:
        """BF16, except for the routers' expert biases and counts: a step changes a bias by less than BF16 can say,
        and a BF16 count stops growing at 256. (Upstream keeps the bias, once rounded, and not the count: router.py:209.)"""
        kept = {name: buffer for name, buffer in self.named_buffers() if name.endswith((".expert_bias", ".local_tokens_per_expert"))}
        super().bfloat16()
        for name, buffer in kept.items():
            module, _, own_name = name.rpartition(".")
            setattr(self.get_submodule(module), own_name, buffer)
        return self

    def forward(self, *args: Any, padding_mask: Tensor | None = None, ahead: Sequence[Ahead] = (), head: Any = None, **kwargs: Any) -> Any:
        """megatron-core's forward. padding_mask [B, S]: True where the routers' auxiliary losses must not look.

        head: (scored positions [N, D], this rank's rows [v, D] of the output table, labels [N]) -> what is returned in the
        place of log-probabilities; the gradient of the positions is partial over tensor ranks, as theirs is.
        """
        self._ahead, self._head = ahead, head  # for `_postprocess`, which megatron-core calls with arguments of its own
        if self.config.num_moe_experts is None:
            padding_mask = None
        elif padding_mask is not None and self.config.sequence_parallel and not self.pre_process:
            # megatron-core (gpt_model.py:314) cuts the mask to this rank's part of the sequence on the first stage only.
            padding_mask = self._own_part(padding_mask)
        try:
            return super().forward(*args, padding_mask=padding_mask, **kwargs)
        finally:
            self._ahead, self._head = (), None

    def _preprocess(self, *args: Any, **kwargs: Any) -> Any:
        """megatron-core's, with a rotary angle a token where documents share a prompt: its table counts every document from 0."""
        found = super()._preprocess(*args, **kwargs)
        if isinstance(kwargs.get("packed_seq_params"), SharedPrefixes) and found[1] is not None:
            # A table as long as the row is read by token (rope_utils.py:211).
            found = (found[0], found[1][kwargs["position_ids"][0]], *found[2:])
        return found

    def _postprocess(self, hidden_states: Tensor, *args: Any, labels: Tensor | None = None, loss_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if not self.post_process:
            return hidden_states
        if labels is None:
            return self._logits(hidden_states, kwargs["runtime_gather_output"], kwargs["inference_context"])
        mask = torch.ones_like(labels, dtype=torch.bool) if loss_mask is None else loss_mask
        found = self._logprobs(hidden_states, labels, mask)
        if not self._ahead:
            return found
        outputs = [found]
        for module, ahead in zip(self.mtp.layers, self._ahead, strict=True):
            embedded = self.embedding(input_ids=ahead.tokens, position_ids=kwargs["position_ids"])
            padding = None if self.config.num_moe_experts is None else self._own_part(ahead.padding)
            hidden_states = module(hidden_states, embedded, padding, kwargs["rotary_pos_emb"], kwargs["packed_seq_params"])
            outputs.append(self._logprobs(hidden_states, ahead.labels, ahead.loss_mask))
        return outputs

    def _logits(self, hidden_states: Tensor, gather: bool | None, context: Any) -> Tensor:
        """[B, S, V], or of the last position alone where a generating context wants no more."""
        if context is not None and not self.training and context.materialize_only_last_token_logits:
            hidden_states = hidden_states[-1:]
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _ = self.output_layer(hidden_states, weight=weight, runtime_gather_output=gather)
        return logits.transpose(0, 1).contiguous()

    def _logprobs(self, hidden_states: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            # Backward: reduce-scatter. Each rank's gradient is that of its own part of the vocabulary.
            hidden = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=True, group=group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden_states, group=group)
        scored = mask.flatten().nonzero().squeeze(-1)
        # [S, B, D] with B = 1 for packed rows; [B, S] labels follow the same order after the transpose.
        hidden_TD = hidden.transpose(0, 1).reshape(-1, hidden.shape[-1])[scored]
        for gathered in self.output_layer._forward_pre_hooks.values():
            gathered(self.output_layer, ())  # DDP waits there for overlapped gathering; only its weight is used here
        weight: Any = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else self.output_layer.weight
        if self._head is not None:
            return self._head(hidden_TD, weight, labels.flatten()[scored])
        logprobs, correct = vocab_parallel_logprobs(hidden_TD, weight, labels.flatten()[scored], group, self.real_vocab_size)
        return torch.stack([logprobs, correct.float()])

    def _own_part(self, mask_BS: Tensor) -> Tensor:
        """What of a mask belongs to this rank's part of the sequence."""
        if not self.config.sequence_parallel:
            return mask_BS
        return mask_BS.chunk(self.pg_collection.tp.size(), dim=1)[self.pg_collection.tp.rank()]

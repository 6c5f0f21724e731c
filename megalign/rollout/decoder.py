"""A batch of sequences stepped through the model with a key/value cache, over tensor and pipeline ranks.

Prompts of different lengths are padded on the LEFT, so that every row's next token stands in the same slot.
Rotary positions are relative, so a slot serves as a position; the mask hides the padding.

# B sequences, N slots of one step, S' slots so far, D model, V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalign.parallel.grid import Grid
from megalign.parallel.init import device


class Decoder:
    """The cache of one batch. Every rank of the pipeline makes the same calls.

    first_B: slot of each row's first token; the slots before it are padding. max_slots: size of the cache.
    Use it inside `generating(chunks)`.
    """

    def __init__(self, chunks: Sequence[Any], grid: Grid, first_B: Tensor, max_slots: int):
        from megatron.core.inference.contexts import StaticInferenceContext

        self.chunks, self.grid = chunks, grid
        self.first_B = first_B.to(device())
        self.context = StaticInferenceContext(len(first_B), max_slots)

    @torch.no_grad()  # not inference_mode: the model keeps its rotary tables for training
    def step(self, tokens_BN: Tensor) -> Tensor | None:
        """Append N tokens a row; FP32 logits [B, V] after the last one on the last stage, else None."""
        tokens_BN = tokens_BN.to(device())
        start, count = self.context.sequence_len_offset, tokens_BN.shape[1]
        slots_N = torch.arange(start, start + count, device=device())
        positions_BN = (slots_N - self.first_B[:, None]).clamp(min=0)
        mask = hidden_slots(slots_N, self.first_B)
        options = {"inference_context": self.context, "runtime_gather_output": True}
        out: Any = None
        for chunk in self.chunks:
            if not chunk.pre_process:
                shape, dtype = (count, len(tokens_BN), chunk.config.hidden_size), chunk.config.pipeline_dtype
                chunk.set_input_tensor(self._receive(torch.empty(shape, dtype=dtype, device=device())))
            out = chunk(tokens_BN, positions_BN, mask, **options)
            if not chunk.pre_process:
                chunk.set_input_tensor(None)
            if not chunk.post_process:
                self._send(out)
        self.context.sequence_len_offset += count
        self.context.enable_decode_mode()
        return out[:, -1].float() if self.chunks[-1].post_process else None

    def _receive(self, hidden_NBD: Tensor) -> Tensor:
        dist.recv(hidden_NBD, self._stage(-1), group=self.grid.pipeline.group)
        return hidden_NBD

    def _send(self, hidden_NBD: Tensor) -> None:
        dist.send(hidden_NBD.contiguous(), self._stage(+1), group=self.grid.pipeline.group)

    def _stage(self, step: int) -> int:
        """Global rank of a neighbour; the last stage's next is the first (interleaved stages)."""
        pipeline = self.grid.pipeline
        return dist.get_global_rank(pipeline.group, (pipeline.rank + step) % pipeline.size)


def hidden_slots(slots_N: Tensor, first_B: Tensor) -> Tensor:
    """The attention mask [B, 1, N, S'] of queries in `slots_N`: True at keys ahead, and at padding.

    A padding slot looks at itself: a softmax over nothing would be NaN, and NaN spreads through 0 * NaN.
    """
    keys_S = torch.arange(int(slots_N[-1]) + 1, device=slots_N.device)
    ahead_NS, itself_NS = keys_S > slots_N[:, None], keys_S == slots_N[:, None]
    padding_B1S = (keys_S < first_B[:, None])[:, None]
    return (ahead_NS | padding_B1S & ~itself_NS)[:, None]

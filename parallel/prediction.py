"""Multi-token prediction: modules behind the last layer that predict further ahead (DeepSeek-V3, arXiv:2412.19437, section 2.2).

    h'_i = M [RMSNorm(Emb(t_{i+k})); RMSNorm(h_i)]      h: what the module before gave, or the model's final norm
    h_i  = RMSNorm(layer(h'))                            scored by the model's own head on token i + k + 1

Embedding and head are the model's. The block, its parameters and its checkpoint are megatron-core's; the pass through a
module is ours, for three reasons: upstream shifts the tokens inside the module (with messages between context-parallel
ranks for each document), gives the routers no padding mask, and has no place for either argument.
"""

from __future__ import annotations

import contextlib
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megalign.parallel.layers import has_experts, local_layer_spec, norm_of


class PredictionModule(MultiTokenPredictionLayer):
    """One module: two norms, a projection of both halves, a transformer layer, a norm."""

    def forward(self, hidden_SBD: Tensor, embedded_SBD: Tensor, padding_BS: Tensor | None, rotary: Tensor | None, packed: Any) -> Tensor:  # pyright: ignore
        """hidden, embedded: this rank's part of the sequence under sequence parallelism. padding: what routers leave out."""

        def run(hidden: Tensor, embedded: Tensor) -> Tensor:
            tracker: Any = tensor_parallel.get_cuda_rng_tracker()
            with tracker.fork() if self.config.sequence_parallel else contextlib.nullcontext():
                joined = self._concat_embeddings(hidden, embedded)
                out, _ = self.transformer_layer(
                    hidden_states=joined, attention_mask=None, rotary_pos_emb=rotary, packed_seq_params=packed, padding_mask=padding_BS
                )
            return self._postprocess(out)

        if self.training and self.config.recompute_granularity == "full" and self.config.recompute_method == "uniform":
            return tensor_parallel.checkpoint(run, self.config.distribute_saved_activations, hidden_SBD, embedded_SBD)
        return run(hidden_SBD, embedded_SBD)


def prediction_spec(config: TransformerConfig) -> Any:
    """`mtp_num_layers` modules, whose transformer layers are like the model's last."""
    norm = norm_of(config)
    module = ModuleSpec(
        module=PredictionModule,
        submodules=MultiTokenPredictionLayerSubmodules(
            enorm=norm,
            hnorm=norm,
            eh_proj=ColumnParallelLinear,
            transformer_layer=local_layer_spec(config, experts=has_experts(config)[-1]),
            layer_norm=norm,
        ),
    )
    return MultiTokenPredictionBlockSubmodules(layer_specs=[module] * (config.mtp_num_layers or 0))

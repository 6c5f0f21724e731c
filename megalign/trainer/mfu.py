"""Model FLOPs utilisation of a run: its formula's inputs, gathered."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megalign.config.layout import layers_with_experts
from megalign.config.schema import ModelConfig
from megalign.config.size import Counts, idle_parameters, prediction_parameters
from megalign.parallel.init import World, cpu_cores
from megalign.trainer.metrics import NullLogger
from megalign.trainer.peaks import device_peak_flops, model_flops_per_token


class Speed:
    """Tokens a second and model FLOPs utilisation, step by step. peak_flops: 0 if unknown."""

    def __init__(self, flops_per_token: float, peak_flops: float, log: NullLogger):
        self.flops_per_token, self.peak_flops, self.log = flops_per_token, peak_flops, log

    def of_step(self, step: int, tokens: int, seconds: float) -> dict[str, float | None]:
        """{"tokens_per_second", "mfu" (0 to 1, None if the peak is unknown), "step_time" in seconds}."""
        achieved = tokens / seconds * self.flops_per_token
        if 0 < self.peak_flops < achieved:
            was, now = f"{self.peak_flops / 1e9:,.0f} GFLOP/s", f"{achieved / 1e9:,.0f}"
            self.log.event(step, "warning", f"the device's peak was measured while it was busy ({was}); this step reached {now}, MFU now refers to that")
            self.peak_flops = achieved
        return {"tokens_per_second": tokens / seconds, "mfu": achieved / self.peak_flops if self.peak_flops else None, "step_time": seconds}


def flops_per_token(model: ModelConfig, counts: Counts, statistics: dict[str, Any], *, frozen: bool = False) -> float:
    """FLOPs of one token of this data, forward and backward, prediction modules included. statistics: those of the training set.
    frozen: only adapters are trained."""
    documents = max(1, statistics["rows_kept"])
    modules = model.mtp_num_layers or 0 if model.mtp_loss_scaling_factor else 0
    experts = layers_with_experts(model)[-1]
    ahead = sum(prediction_parameters(model).values()) - experts * idle_parameters(model) + counts.by_part.get("embedding", 0)  # and the head once more
    embedding = 0 if model.share_embeddings_and_output_weights else counts.by_part.get("embedding", 0)
    return model_flops_per_token(
        counts.active + modules * ahead,
        embedding_parameters=embedding,
        num_layers=model.num_layers + modules,
        num_attention_heads=model.num_attention_heads,
        kv_channels=_head_size(model),
        frozen=frozen,
        sequence_length=min(statistics["sequence_length"], statistics["tokens"] / documents),
    )


def _head_size(model: ModelConfig) -> float:
    """Of scores and values alike; the mean of both sizes where they differ, as their FLOPs add up (MLA)."""
    if model.multi_latent_attention:
        return (model.qk_head_dim + model.qk_pos_emb_head_dim + model.v_head_dim) / 2
    return model.kv_channels or model.hidden_size // model.num_attention_heads


def world_peak_flops(world: World, precision: str) -> float:
    """Measured peak FLOP/s of all devices together (collective): a GPU a rank, or all cores of each host."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    peak = 0.0
    dist.barrier()  # nobody is still at work when the measurement begins
    if torch.cuda.is_available():
        peak = device_peak_flops(dtype) * world.size
    elif world.rank == 0:  # one rank measures with every core while the others wait
        threads = torch.get_num_threads()
        torch.set_num_threads(cpu_cores())
        peak = device_peak_flops(dtype) * (world.size // world.local_size)
        torch.set_num_threads(threads)
    dist.barrier()
    return peak

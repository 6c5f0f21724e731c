"""Model FLOPs utilisation of a run: its formula's inputs, gathered."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megalign.config.schema import ModelConfig
from megalign.config.size import Counts
from megalign.parallel.init import World, cpu_cores
from megalign.trainer.peaks import device_peak_flops, model_flops_per_token


def flops_per_token(model: ModelConfig, counts: Counts, statistics: dict[str, Any]) -> float:
    """FLOPs of one token of this data, forward and backward. statistics: those of the training set."""
    documents = max(1, statistics["rows_kept"])
    embedding = 0 if model.share_embeddings_and_output_weights else counts.by_part.get("embedding", 0)
    return model_flops_per_token(
        counts.active,
        embedding_parameters=embedding,
        num_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        kv_channels=model.kv_channels or model.hidden_size // model.num_attention_heads,
        sequence_length=min(statistics["sequence_length"], statistics["tokens"] / documents),
    )


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

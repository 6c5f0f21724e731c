"""The third set of seeded faults: committed before the auditor, which had not changed since 258d2c0, had seen any of them."""

from __future__ import annotations

import re
from typing import Any

import torch.distributed as dist
from seeded_injections import (
    bias_of_one_rank,
    ddp_factor,
    declared,
    flags,
    frozen_on_one_rank,
    loss_scale,
    named,
    scaled_sums,
    shifted,
    state,
)
from seeded_layouts import Fault


def rounded_on_one_rank(models: Any, grid: Any) -> None:
    """One rank has read the router from a BF16 file, the others from an FP32 one."""
    if dist.get_rank() == 1:
        for parameter in named(models, "router.weight"):
            parameter.data.copy_(parameter.data.bfloat16())


def moments_exchanged(engine: Any) -> None:
    """One rank's moments of two norms are in each other's place, as after a load by position."""
    if dist.get_rank() != 1:
        return
    from megalign.models.held import held_by
    from megalign.parallel.audit.held import states

    held = [h for h in held_by(engine.models, engine.grid) if re.search(r"layers\.[01]\.input_layernorm", h.name)]
    first, second = [entry.value for entry in states(held, engine.optimizer) if entry.kind == "exp_avg"]
    kept = first.clone()
    first.copy_(second)
    second.copy_(kept)


def gradient_written_over(engine: Any) -> None:
    """User code clips one parameter's gradient by itself, on one rank, after everything was reduced."""
    before = engine.audit.before_update

    def clipped(step: int) -> Any:
        if dist.get_rank() == 1:
            for parameter in named(engine, "final_layernorm"):
                parameter.main_grad.clamp_(-1e-4, 1e-4)
        return before(step)

    engine.audit.before_update = clipped


THIRD: dict[str, Fault] = {
    "query norm off on one data rank of a stage": Fault("stages, data", "built", shifted("q_layernorm", rank=3, by=0.125), "q_layernorm", "INITIALISATION"),
    "position table off on one tensor rank": Fault("tensor", "built", shifted("position_embeddings"), "position_embeddings", "INITIALISATION"),
    "router rounded on one rank": Fault("expert", "built", rounded_on_one_rank, r"router\.weight", "INITIALISATION"),
    "norm flag of the first layer removed": Fault("tensor, megatron's sums", "placed", flags("layers.0.pre_mlp_layernorm", sequence_parallel=False), r"layers\.0\.pre_mlp_layernorm", "MISSING_SUM"),
    "the router's sum is half too large": Fault("tensor", "code", scaled_sums(1.5, "router"), r"router\.weight", "TOO_LARGE", probe=True),
    "dense gradients averaged twice": Fault("expert", "code", ddp_factor(False, 0.5), r"^(?!.*local_experts)", "TOO_SMALL", probe=True),
    "loss halved for context ranks": Fault("tensor, context", "code", loss_scale(0.5), "layernorm|linear|embedding|output_layer", "TOO_SMALL", probe=True),
    "final norm declared full": Fault("tensor", "built", declared("final_layernorm", tensor="full"), "final_layernorm", "NOT_EQUAL"),
    "final norm left out of the norm": Fault("expert", "placed", flags("final_layernorm", shared=True), "final_layernorm", "NOT_COUNTED"),
    "router counted on every tensor rank": Fault("tensor", "placed", flags("router.weight", tensor_model_parallel=True), r"router\.weight", "COUNTED_TWICE"),
    "an expert's first moment diverged": Fault("data", "running", state("exp_avg", r"local_experts\.0\.linear_fc2"), r"local_experts\.\d\.linear_fc2", "MOMENTS"),
    "moments of two norms exchanged": Fault("data", "running", moments_exchanged, r"layers\.[01]\.input_layernorm", "MOMENTS"),
    "master of the embedding diverged": Fault("data", "running", state("master", "word_embeddings"), "word_embeddings", "MASTERS"),
    "gradient clipped on one rank by user code": Fault("tensor", "running", gradient_written_over, "final_layernorm", "MISSING_SUM|NOT_EQUAL"),
    "norm changed outside the optimizer": Fault("tensor, stages, expert", "running", shifted(r"layers\.0\.input_layernorm"), r"layers\.0\.input_layernorm", "CHANGED"),
    "router frozen on one rank": Fault("expert", "running", frozen_on_one_rank("layers.0.mlp.router"), r"layers\.0\.mlp\.router", "FROZEN"),
    "expert bias of one rank of four": Fault("cut experts", "running", bias_of_one_rank, "expert_bias", "BUFFER"),
}  # fmt: skip

"""Seeded faults: training engines that are wrong in one way, for the auditor to find. It knows nothing of these files.

A `Fault` is put in where such faults come from: into the model before its parameters are placed, after that (what user
code or another library would overwrite), into a collective, or into a run between two of the auditor's looks. The auditor
runs as a recipe has it by default: at the start, at the first step and at every hundredth, with the probe where a fault
leaves all copies equal (seeded_runs.py).
"""

from __future__ import annotations

from seeded_injections import (
    bias_in_bf16,
    bias_of_one_rank,
    ddp_factor,
    declared,
    flags,
    frozen_on_one_rank,
    late_parameter,
    loss_scale,
    lost_factor,
    norm_flag_on_stage,
    per_rank_seed,
    scaled_sums,
    sent_by_nobody,
    shifted,
    state,
)
from seeded_layouts import Fault
from seeded_second import SECOND
from seeded_third import THIRD

FIRST: dict[str, Fault] = {
    # initialisation
    "router drawn per rank": Fault("tensor", "built", per_rank_seed("router.weight"), r"router\.weight", "INITIALISATION"),
    "norm off on one rank": Fault("expert", "built", shifted("layers.0.input_layernorm"), r"layers\.0\.input_layernorm", "INITIALISATION"),
    "shared expert drawn per rank": Fault("expert", "built", per_rank_seed("shared_experts.linear_fc2"), r"shared_experts\.linear_fc2", "INITIALISATION"),
    "cut weight off on a data rank": Fault("stages, data", "built", shifted("layers.0.self_attention.linear_qkv"), r"layers\.\d\.self_attention\.linear_qkv", "INITIALISATION"),
    "tied table drawn per stage": Fault("stages, data", "built", shifted("output_layer", rank=2), "word_embeddings", "INITIALISATION"),
    # flags removed or wrongly set after the model was placed
    "norm flag removed": Fault("tensor, megatron's sums", "placed", flags("layers.1.input_layernorm", sequence_parallel=False), r"layers\.1\.input_layernorm", "MISSING_SUM"),
    "router flag removed": Fault("tensor, megatron's sums", "placed", flags("router.weight", sequence_parallel=False), r"router\.weight", "MISSING_SUM"),
    "final norm flag removed": Fault("tensor, megatron's sums", "placed", flags("final_layernorm", sequence_parallel=False), "final_layernorm", "MISSING_SUM"),
    "dense parameter says it is an expert": Fault("expert", "placed", flags("final_layernorm", allreduce=False), "final_layernorm", "MISSING_SUM"),
    "shared expert says it is an expert": Fault("expert", "placed", flags("shared_experts.linear_fc1", allreduce=False), r"shared_experts\.linear_fc1", "MISSING_SUM"),
    "expert says it is none": Fault("expert", "placed", flags("local_experts", allreduce=True), "local_experts", "REFUSED", probe=True),
    "full gradient summed by flag": Fault("tensor, megatron's sums", "placed", flags("position_embeddings", sequence_parallel=True), "position_embeddings", "TOO_LARGE", probe=True),
    "averaged by flag": Fault("tensor, megatron's sums", "placed", flags("pre_mlp_layernorm", average_gradients_across_tp_domain=True), "pre_mlp_layernorm", "TOO_SMALL", probe=True),
    # hooks
    "hook of norms gone": Fault("tensor", "code", sent_by_nobody("input_layernorm"), "input_layernorm", "MISSING_SUM"),
    "hook of the router gone": Fault("tensor", "code", sent_by_nobody("router"), r"router\.weight", "MISSING_SUM"),
    "hook of the final norm gone": Fault("tensor, stages, expert", "code", sent_by_nobody("final_layernorm"), "final_layernorm", "MISSING_SUM"),
    "hook gone, with context": Fault("tensor, context", "code", sent_by_nobody("pre_mlp_layernorm"), "pre_mlp_layernorm", "MISSING_SUM"),
    "hooks reduce twice": Fault("tensor", "code", scaled_sums(2.0), "layernorm|router", "TOO_LARGE", probe=True),
    "hooks average": Fault("cut experts", "code", scaled_sums(0.5), "layernorm|router", "TOO_SMALL", probe=True),
    # declarations
    "full gradient declared partial": Fault("tensor", "built", declared("position_embeddings", tensor="partial"), "position_embeddings", "TOO_LARGE", probe=True),
    "partial gradient declared full": Fault("tensor", "built", declared("layers.0.pre_mlp_layernorm", tensor="full"), r"layers\.0\.pre_mlp_layernorm", "NOT_EQUAL"),
    "partial gradient declared duplicated": Fault("tensor", "built", declared("router.weight", tensor="duplicated"), r"router\.weight", "TOO_SMALL", probe=True),
    # factors in DDP, in the loss, in a layer
    "experts summed without a mean": Fault("expert", "code", ddp_factor(True, 2.0), "local_experts", "TOO_LARGE", probe=True),
    "experts averaged twice": Fault("cut experts", "code", ddp_factor(True, 0.5), "local_experts", "TOO_SMALL", probe=True),
    "dense gradients summed without a mean": Fault("data", "code", ddp_factor(False, 2.0), "layernorm|linear|embedding|router|output_layer", "TOO_LARGE", probe=True),
    "context ranks taken for data ranks": Fault("tensor, context", "code", loss_scale(2.0), "layernorm|linear|embedding|output_layer", "TOO_LARGE", probe=True),
    "a layer loses a factor": Fault("expert", "built", lost_factor, "final_layernorm", "TOO_SMALL", probe=True),
    # the norm
    "copies counted on every tensor rank": Fault("tensor", "placed", flags("input_layernorm", tensor_model_parallel=True), "input_layernorm", "COUNTED_TWICE"),
    "a cut weight counted on one rank": Fault("tensor", "placed", flags("linear_qkv", tensor_model_parallel=False), "linear_qkv", "NOT_COUNTED"),
    "an expert left out of the norm": Fault("cut experts", "placed", flags("local_experts.0.linear_fc1", shared=True), r"local_experts\.\d\.linear_fc1", "NOT_COUNTED"),
    "tied table counted on both stages": Fault("tensor, stages, expert", "placed", norm_flag_on_stage, "word_embeddings", "COUNTED_TWICE"),
    # in a run
    "expert bias in BF16": Fault("data", "running", bias_in_bf16, "expert_bias", "LOW_PRECISION"),
    "expert bias of one rank": Fault("tensor", "running", bias_of_one_rank, "expert_bias", "BUFFER"),
    "first moment diverged": Fault("data", "running", state("exp_avg", r"layers\.1\.mlp\.router\.weight"), r"layers\.1\.mlp\.router\.weight", "MOMENTS"),
    "second moment diverged": Fault("tensor", "running", state("exp_avg_sq", "final_layernorm"), "final_layernorm", "MOMENTS"),
    "master weight diverged": Fault("data", "running", state("master", r"layers\.0\.input_layernorm"), r"layers\.0\.input_layernorm", "MASTERS"),
    "weight changed outside the optimizer": Fault("tensor, stages, expert", "running", shifted(r"layers\.0\.mlp\.router\.weight"), r"layers\.\d\.mlp\.router\.weight", "CHANGED"),
    "frozen on one rank": Fault("tensor", "running", frozen_on_one_rank("layers.1.pre_mlp_layernorm"), r"layers\.1\.pre_mlp_layernorm", "FROZEN"),
    "added late": Fault("data", "running", late_parameter, "late_scale", "LATE"),
}  # fmt: skip

FAULTS = {**FIRST, **SECOND, **THIRD}

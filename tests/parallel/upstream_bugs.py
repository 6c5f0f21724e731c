"""Known errors of megatron-core and its neighbours, each as one defect put into a correct run.

A `Bug` names its thread, the layout on which it shows, and the function that brings it back: a flag that our layer spec
sets and others forget, a rule by name that does not know the name, a reduction that nobody makes. A defect may also be
a module as users add it (value head, LoRA): then the wrong run leaves it as upstream treats it, and the right one declares it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from upstream_modules import Models, Prepare, head_norm, layer_scale, lora, value_head

SHAPE = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 2}
DENSE = {**SHAPE, "qk_layernorm": True}
MOE = {
    **DENSE, "num_moe_experts": 4, "moe_ffn_hidden_size": 48, "moe_shared_expert_intermediate_size": 32, "moe_aux_loss_coeff": 0.01,
}  # fmt: skip
LEARNED = {"position_embedding_type": "learned_absolute", "share_embeddings_and_output_weights": True}
GATE = {"moe_shared_expert_gate": True}
TP2 = dict(tensor_model_parallel_size=2)
TP2_SP = dict(tensor_model_parallel_size=2, sequence_parallel=True)
PP2 = dict(pipeline_model_parallel_size=2)
EP2 = dict(expert_model_parallel_size=2)


@dataclass(frozen=True)
class Bug:
    """wrong, right: functions of (models, grid) called before parameters are placed and wrapped."""

    thread: str
    model: dict[str, Any]
    layout: dict[str, Any]
    parameters: str  # regular expression: exactly the parameters whose gradient is wrong (norm_only: that are counted twice)
    wrong: Prepare
    right: Prepare | None = None
    world: int = 2
    distributed: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    norm_only: bool = False  # every gradient is right, their norm is not
    document_multiple: int = 1


def _each(models: Models, pattern: str) -> list[Any]:
    found = [p for chunk in models for name, p in chunk.named_parameters() if re.search(pattern, name)]
    return found


def without_flag(pattern: str) -> Prepare:
    """Parameters that do not say that they see this rank's tokens alone."""

    def forget(models: Models, grid: Any) -> None:
        for parameter in _each(models, pattern):
            parameter.sequence_parallel = False

    return forget


def with_flag(pattern: str, **flags: Any) -> Prepare:
    """Parameters that say what is not so."""

    def claim(models: Models, grid: Any) -> None:
        for parameter in _each(models, pattern):
            for name, value in flags.items():
                setattr(parameter, name, value)

    return claim


def unknown_norms(models: Models, grid: Any) -> None:
    """Per-head norms that megatron's rule does not know, as under another name (finalize_model_grads.py:288)."""
    models[0].config.qk_layernorm = False


def stages_cut_apart(models: Models, grid: Any) -> None:
    """The tied table is cut by the distributed optimizer with its neighbours, on each stage with others (param_and_grad_buffer.py:707)."""
    for parameter in _each(models, "word_embeddings|output_layer"):
        del parameter.shared_embedding


BUGS: dict[str, Bug] = {
    "router": Bug(
        "Megatron-LM 599", MOE, TP2_SP, r"router\.weight", without_flag(r"router\.weight"), options=GATE),
    "shared-expert gate": Bug(
        "Pai-Megatron-Patch 397", MOE, TP2_SP, r"gate_weight", without_flag("gate_weight"), options=GATE),
    "final layernorm": Bug(
        "Megatron-LM 1446", MOE, TP2_SP, r"final_layernorm", without_flag("final_layernorm"), options=GATE),
    "layernorms": Bug(
        "megatron.md: norms without the attribute", MOE, TP2_SP, r"(input|pre_mlp)_layernorm", without_flag("(input|pre_mlp)_layernorm"), options=GATE),
    "expert flag": Bug(
        "Megatron-LM 5916, 6080, 1622", MOE, TP2_SP, r"local_experts", with_flag("local_experts", allreduce=True), options=GATE),
    "norm of copies": Bug(
        "NeMo-RL 3788", MOE, TP2_SP, "layernorm|router|gate_weight", with_flag("layernorm|router|gate_weight", tensor_model_parallel=True), options=GATE, norm_only=True),
    "per-head norms": Bug(
        "Megatron-LM 816", DENSE, TP2, r"[qk]_layernorm", unknown_norms),
    "norm of the heads' outputs": Bug(
        "Megatron-LM 7452, finding 11", DENSE, TP2, r"out_norm", head_norm(False), head_norm(True)),
    "value head": Bug(
        "NeMo-RL 2530, 2839", DENSE, TP2_SP, r"value_head", value_head(False), value_head(True)),
    "LoRA factor": Bug(
        "mcore-bridge 173", DENSE, TP2_SP, r"proj\.lora_b|qkv\.lora_a", lora(False), lora(True)),
    "position embedding, tagged": Bug(
        "megatron.md: position embedding", LEARNED | DENSE, TP2_SP, "position_embeddings", with_flag("position_embeddings", sequence_parallel=True)),
    "position embedding as an expert": Bug(
        "megatron.md: mis-tagged allreduce=False", LEARNED | MOE, EP2, "position_embeddings", with_flag("position_embeddings", allreduce=False)),
    "copied on several stages": Bug(
        "megatron.md: parameters copied on several stages", DENSE, PP2, "layer_scale", layer_scale(False), layer_scale(True)),
    "tied embedding, distributed": Bug(
        "Megatron-LM 844", LEARNED | DENSE, PP2, "word_embeddings", stages_cut_apart, world=4, distributed=True),
    "layernorm with context parallelism": Bug(
        "Megatron-LM 1528", DENSE, {**TP2_SP, "context_parallel_size": 2}, "input_layernorm", without_flag("input_layernorm"),
        world=4, document_multiple=4),
}  # fmt: skip

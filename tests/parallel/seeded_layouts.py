"""What seeded faults are put into: the layouts, and what a fault is (seeded_faults.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

VOCAB = 120
SHAPE = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 2, "qk_layernorm": True}
MOE = {
    **SHAPE, "num_moe_experts": 4, "moe_ffn_hidden_size": 48, "moe_shared_expert_intermediate_size": 32,
    "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True,
}  # fmt: skip
TIED = {**MOE, "share_embeddings_and_output_weights": True, "position_embedding_type": "learned_absolute", "max_position_embeddings": 64}
TP2 = dict(tensor_model_parallel_size=2, sequence_parallel=True)
EP2 = dict(expert_model_parallel_size=2)
PP2 = dict(pipeline_model_parallel_size=2)
PLAIN: dict[str, Any] = dict(use_distributed_optimizer=False)
AFTER: dict[str, Any] = dict(reduce_in_backward=False)  # megatron's finalisation instead of hooks
# name: (ranks, model, section `parallel`, precision)
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any], str]] = {
    "tensor": (2, TIED, TP2, "fp32"),
    "tensor, megatron's sums": (2, TIED, {**TP2, **AFTER}, "fp32"),
    "expert": (2, MOE, EP2, "fp32"),
    "data": (2, MOE, PLAIN, "bf16"),
    "tensor, stages, expert": (4, TIED, {**TP2, **PP2, **EP2, **PLAIN}, "fp32"),
    "stages, data": (4, TIED, PP2, "bf16"),
    "tensor, context": (4, SHAPE, {**TP2, "context_parallel_size": 2}, "fp32"),
    "cut experts": (4, MOE, {**TP2, **EP2, "expert_tensor_parallel_size": 2}, "fp32"),
}
REFUSED = "refused when the parameters are placed"
LATE = 98  # a run is joined here: looked at 98 (its first) and 100, a fault of the run comes at 99


@dataclass(frozen=True)
class Fault:
    """when: "built" (models, grid), "placed" (models, grid), "made" (engine), "running" (engine), or "code" (nothing).

    finding: regular expression of the parameter; cause: the name of a constant of `megalign.parallel.audit.findings`, or
    REFUSED: the probe places the parameters of its copy again, and flags that contradict each other stop it there.
    """

    layout: str
    when: str
    inject: Callable[..., None]
    finding: str
    cause: str
    probe: bool = False


def recipe_of(layout: str, probe: bool) -> Any:
    from megalign.config.schema import Recipe

    _, model, parallel, precision = LAYOUTS[layout]
    return Recipe.model_validate(
        {
            "model": model,
            "parallel": parallel,
            "train": {"precision": precision, "global_batch_size": 8},
            "optimizer": {"lr": 1e-3},
            "data": {"sequence_length": 48},
            "audit": {"probe": probe},
        }
    )

"""For ablations only: gradients of copied parameters that are NOT reduced, as in a stack that has forgotten to.

Left out is the expert-parallel group: each of its ranks goes on with the mean gradient of its own tokens, and the copies
drift apart. Where that group spans tensor ranks, their sums under sequence parallelism are left out too.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist

from megalign.parallel.grid import Grid
from megalign.parallel.placement import HOOK, NOBODY, TENSOR_SUM, Placement
from megalign.parallel.reduction import new_groups

Class = Literal["position_embeddings", "expert_parallel"]
_POSITION = ("position_embeddings.weight", "linear_kv_down_proj.weight")  # of the latter, the rotary key's rows


def unreduced(placements: Sequence[Placement], grid: Grid, classes: Collection[Class]) -> tuple[list[Placement], list[Placement]]:
    """(all placements, without a reducer over tensor ranks where it is left out; those that `classes` name).

    position_embeddings: the learned table, MLA's shared rotary key. expert_parallel: everything else that is copied over
    expert-parallel ranks. Call it before hooks are attached. Per-head norms keep megatron's sum over tensor ranks.
    """
    spans_tensor = len(_common(grid.expert.group, grid.tensor.group)) > 1
    result, chosen = [], []
    for p in placements:
        kind = "position_embeddings" if p.name.endswith(_POSITION) else "expert_parallel"
        if p.is_expert or kind not in classes or not p.parameter.requires_grad or "pipeline" in p.gradients:
            result.append(p)
            continue
        by_name = p.reducers.get("tensor") == TENSOR_SUM and p.source == "per-head norm"
        if spans_tensor and p.reducers.get("tensor") in (HOOK, TENSOR_SUM) and not by_name:
            p = replace(p, reducers={**p.reducers, "tensor": NOBODY})
            p.parameter.sequence_parallel = False  # pyright: ignore[reportAttributeAccessIssue]
        result.append(p)
        chosen.append(p)
    return result, chosen


def leave_out(chunks: Sequence[Any], chosen: Sequence[Placement], grid: Grid) -> int:
    """Leave the gradients of `chosen` unreduced over expert-parallel ranks; return how many parameters (collective).

    Call it after DDP is made and before hooks are attached, which then come first. Raises ValueError with the distributed optimizer, which keeps copies equal whatever their gradients are.
    """
    if chunks[0].ddp_config.use_distributed_optimizer:
        raise ValueError("parallel.use_distributed_optimizer is true: it sends one rank's update to all copies, so nothing could drift; set it to false")
    # A part of a sum over n tensor ranks, times n: the mean over this rank's tokens.
    factors = {id(p.parameter): float(grid.tensor.size) if p.gradients.get("tensor") == "partial" and p.reducers["tensor"] == NOBODY else 1.0 for p in chosen}
    still = tuple(_common(grid.data_context.group, grid.expert_data.group))
    group = new_groups([still])[still]
    for chunk in chunks:
        for ddp_group in chunk.bucket_groups:
            held = [(p, factors[id(p)]) for bucket in ddp_group.buckets for p in bucket.params_list if id(p) in factors]
            if held:
                _keep_local(ddp_group, held, group)
    return len(chosen)


def _common(one: Any, other: Any) -> list[int]:
    return sorted(set(dist.get_process_group_ranks(one)) & set(dist.get_process_group_ranks(other)))


def _keep_local(ddp_group: Any, parameters: list[tuple[Any, float]], group: Any) -> None:
    start, finish = ddp_group.start_grad_sync, ddp_group.finish_grad_sync
    kept: list[torch.Tensor] = []

    def start_grad_sync(*args: Any, **kwargs: Any) -> None:
        kept[:] = [p.main_grad * factor for p, factor in parameters]
        start(*args, **kwargs)

    def finish_grad_sync(*args: Any, **kwargs: Any) -> None:
        finish(*args, **kwargs)
        for (parameter, _), gradient in zip(parameters, kept, strict=True):
            if group.size() > 1:
                dist.all_reduce(gradient, group=group)
                gradient.div_(group.size())
            parameter.main_grad.copy_(gradient)

    ddp_group.start_grad_sync, ddp_group.finish_grad_sync = start_grad_sync, finish_grad_sync

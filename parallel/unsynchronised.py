"""For ablations only: gradients of copied parameters that are NOT reduced, as in a stack that has forgotten to.

`leave_out` undoes, for the parameters given, what DDP adds up over the expert-parallel group: each of its ranks goes on
with the mean gradient of its own tokens, and the copies drift apart.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist

from megalign.parallel.grid import Grid
from megalign.parallel.placement import NOBODY, Placement
from megalign.parallel.reduction import new_groups

Class = Literal["position_embeddings", "expert_parallel"]
_POSITION = ("position_embeddings.weight", "linear_kv_down_proj.weight")  # of the latter, the rotary key's rows


def members(placements: Sequence[Placement], classes: Collection[Class]) -> list[Placement]:
    """The placements that `classes` name: position_embeddings (the learned table, MLA's shared rotary key), and
    expert_parallel: everything else that is copied over expert-parallel ranks."""
    kinds = {p.name: "position_embeddings" if p.name.endswith(_POSITION) else "expert_parallel" for p in placements if not p.is_expert}
    return [p for p in placements if kinds.get(p.name) in classes]


def leave_out(chunks: Sequence[Any], placements: Sequence[Placement], grid: Grid, classes: Collection[Class]) -> int:
    """Leave the gradients of `classes` unreduced over expert-parallel ranks; return how many parameters (collective).

    Position parameters that are partial over tensor ranks stay partial as well. Call it after DDP is made.
    Raises ValueError with the distributed optimizer, which keeps copies equal whatever their gradients are.
    """
    if chunks[0].ddp_config.use_distributed_optimizer:
        raise ValueError("parallel.use_distributed_optimizer is true: it sends one rank's update to all copies, so nothing could drift; set it to false")
    chosen = members(placements, classes)
    mine = {id(p.parameter): p.parameter for p in chosen if p.parameter.requires_grad}
    still = sorted(set(dist.get_process_group_ranks(grid.data_context.group)) & set(dist.get_process_group_ranks(grid.expert_data.group)))
    group = new_groups([tuple(still)])[tuple(still)]
    for chunk in chunks:
        for ddp_group in chunk.bucket_groups:
            held = [mine[id(p)] for bucket in ddp_group.buckets for p in bucket.params_list if id(p) in mine]
            if held:
                _keep_local(ddp_group, held, group)
    for p in chosen:
        if p.name.endswith(_POSITION):
            p.reducers["tensor"] = NOBODY
            p.parameter.sequence_parallel = False  # pyright: ignore[reportAttributeAccessIssue]
    return len(mine)


def _keep_local(ddp_group: Any, parameters: list[Any], group: Any) -> None:
    start, finish = ddp_group.start_grad_sync, ddp_group.finish_grad_sync
    kept: list[torch.Tensor] = []

    def start_grad_sync(*args: Any, **kwargs: Any) -> None:
        kept[:] = [p.main_grad.clone() for p in parameters]
        start(*args, **kwargs)

    def finish_grad_sync(*args: Any, **kwargs: Any) -> None:
        finish(*args, **kwargs)
        for parameter, gradient in zip(parameters, kept, strict=True):
            if group.size() > 1:
                dist.all_reduce(gradient, group=group)
                gradient.div_(group.size())
            parameter.main_grad.copy_(gradient)

    ddp_group.start_grad_sync, ddp_group.finish_grad_sync = start_grad_sync, finish_grad_sync

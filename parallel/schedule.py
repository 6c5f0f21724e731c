"""The one call into megatron's pipeline schedule, and the one place that undoes its loss scaling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalign.parallel.grid import Grid

# (model chunk, microbatch) -> (output of this stage, loss: output -> (scalar to differentiate, metrics))
ForwardStep = Callable[[Any, Any], tuple[Tensor, Callable[[Tensor], tuple[Tensor, dict[str, Any]]]]]


def forward_backward(
    chunks: Sequence[Any],
    microbatches: Sequence[Any],
    forward_step: ForwardStep,
    *,
    grid: Grid,
    tokens_per_microbatch: int,
    forward_only: bool = False,
) -> list[dict[str, Any]]:
    """Run all microbatches through the pipeline; return the metrics of each (last stage only, else empty).

    chunks: the model's virtual stages on this rank. tokens_per_microbatch: packed tokens T of one microbatch
    before context parallelism; every stage must see the same.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def step(iterator: Any, model: Any) -> Any:
        return forward_step(model, next(iterator))

    iterators = [iter(microbatches) for _ in chunks]
    several = grid.virtual_pipeline is not None
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if several else iterators[0],
        model=list(chunks) if several else chunks[0],
        num_microbatches=len(microbatches),
        seq_length=tokens_per_microbatch,
        micro_batch_size=1,
        forward_only=forward_only,
    )


def rescale_for_megatron(loss_sum: Tensor, global_tokens: Tensor | float, num_microbatches: int, grid: Grid) -> Tensor:
    """Turn this rank's sum of token losses into what megatron must be given for the global-token mean.

    Wanted: gradient of L = (sum of token losses over all ranks and microbatches) / global_tokens.
    Done to our scalar x on the way: the schedule computes x * CP / num_microbatches (schedules.py:265), DDP
    averages gradients over DP * CP ranks. Together x / (num_microbatches * DP), hence the factor here.
    """
    return loss_sum * (num_microbatches * grid.data.size / global_tokens)


def sum_over(value: Tensor, group: Any) -> Tensor:
    """All-reduced sum as a new tensor."""
    total = value.clone()
    if group.size() > 1:
        dist.all_reduce(total, group=group)
    return total


def from_last_stage(values: Tensor, grid: Grid) -> Tensor:
    """Give every stage what the last stage computed (values: same shape and dtype everywhere)."""
    if grid.pipeline.size > 1:
        dist.broadcast(values, grid.last_stage_rank, group=grid.pipeline.group)
    return values


def any_rank(flag: bool, grid: Grid) -> bool:
    """True on all ranks if true on one."""
    from megalign.parallel.init import device

    value = torch.tensor([float(flag)], device=device())
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())

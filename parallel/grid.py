"""The grid of ranks: how many of each axis, where this rank stands, and the group of each axis.

This is the one module that reads megatron's global `parallel_state`; everything else is handed a `Grid`.
Rank order is megatron's tp-cp-ep-dp-pp: tensor-parallel neighbours are adjacent, pipeline stages far.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

Group = Any  # torch.distributed.ProcessGroup


@dataclass(frozen=True)
class Axis:
    """One axis of the grid as this rank sees it."""

    size: int
    rank: int
    group: Group


@dataclass(frozen=True)
class Grid:
    """Sizes, positions and groups of all axes.

    tensor, pipeline, context, data: the dense grid, tensor * pipeline * context * data = world.
    expert, expert_tensor, expert_data: the grid of the experts inside each pipeline stage.
    data_context: data and context together, over which dense gradients are summed.
    """

    world: int
    rank: int
    tensor: Axis
    pipeline: Axis
    context: Axis
    data: Axis
    data_context: Axis
    expert: Axis
    expert_tensor: Axis
    expert_data: Axis
    model: Axis  # tensor and pipeline together
    virtual_pipeline: int | None
    process_groups: Any  # megatron.core.process_groups_config.ProcessGroupCollection

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline.rank == self.pipeline.size - 1

    @property
    def last_stage_rank(self) -> int:
        """Global rank that holds the last stage of this rank's pipeline."""
        return dist.get_global_rank(self.pipeline.group, self.pipeline.size - 1)

    @property
    def is_logger(self) -> bool:
        """The one rank that writes files and speaks."""
        return self.rank == 0

    def layout(self) -> dict[str, int]:
        """The sizes, under short names, for logs and reports."""
        axes = dict(tp=self.tensor, pp=self.pipeline, cp=self.context, dp=self.data, ep=self.expert, etp=self.expert_tensor)
        return {name: axis.size for name, axis in axes.items()}


def create_grid(
    *,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    virtual_pipeline_model_parallel_size: int | None = None,
    context_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
    expert_tensor_parallel_size: int | None = None,
) -> Grid:
    """Create the process groups of a layout over the whole world (collective); what is left is data-parallel.

    Experts are not cut by tensor parallelism unless expert_tensor_parallel_size says so.
    Raises RuntimeError when the sizes do not divide the world (the recipe's rules say it earlier, and better).
    """
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size,
        pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size,
        context_parallel_size=context_parallel_size,
        expert_model_parallel_size=expert_model_parallel_size,
        expert_tensor_parallel_size=expert_tensor_parallel_size or 1,
    )

    def axis(group: Group) -> Axis:
        return Axis(size=group.size(), rank=group.rank(), group=group)

    return Grid(
        world=dist.get_world_size(),
        rank=dist.get_rank(),
        tensor=axis(parallel_state.get_tensor_model_parallel_group()),
        pipeline=axis(parallel_state.get_pipeline_model_parallel_group()),
        context=axis(parallel_state.get_context_parallel_group()),
        data=axis(parallel_state.get_data_parallel_group()),
        data_context=axis(parallel_state.get_data_parallel_group(with_context_parallel=True)),
        expert=axis(parallel_state.get_expert_model_parallel_group()),
        expert_tensor=axis(parallel_state.get_expert_tensor_parallel_group()),
        expert_data=axis(parallel_state.get_expert_data_parallel_group()),
        model=axis(parallel_state.get_model_parallel_group()),
        virtual_pipeline=virtual_pipeline_model_parallel_size,
        process_groups=ProcessGroupCollection.use_mpu_process_groups(),
    )


def destroy_grid() -> None:
    """Give up the groups of this layout, so that another can be created in the same world (collective)."""
    dist.barrier()  # no rank closes a connection that another still reads from
    forget_grid()
    # Each group of gloo has three threads, which wake now and then as long as anything holds the group.
    for group in list(dist.distributed_c10d._world.pg_map):  # pyright: ignore[reportPrivateImportUsage]
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    gc.collect()


def forget_grid() -> None:
    """Have megatron forget the groups; no other rank is asked."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.destroy_global_memory_buffer()

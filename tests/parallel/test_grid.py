"""Layouts one after the other in the same world leave nothing behind."""

from __future__ import annotations

import os

import pytest
from ranks import run_ranks

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc")


def threads_after(layouts: int) -> list[int]:
    """Threads of this rank before, and after each layout has been used and given up."""
    import torch
    import torch.distributed as dist

    from megalign.parallel.grid import create_grid, destroy_grid

    found = [len(os.listdir("/proc/self/task"))]
    for _ in range(layouts):
        grid = create_grid(tensor_model_parallel_size=2)
        assert grid.tensor.size == 2
        dist.all_reduce(torch.ones(1), group=grid.tensor.group)
        del grid
        destroy_grid()
        found.append(len(os.listdir("/proc/self/task")))
    return found


def test_the_threads_of_a_layout_end_with_it():
    for found in run_ranks(threads_after, 2, 4):
        assert found[-1] <= found[1] <= found[0] + 8, found

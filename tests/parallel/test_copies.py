"""The two patches that only save copies: the same result, and upstream still makes the copies that they save."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings import rope_utils
from torch.profiler import ProfilerActivity, profile

from megalign.parallel import cpu


def copies_of(work):
    """How often `work` runs an operation that only moves data."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        work()
    return sum(event.count for event in trace.key_averages() if event.key in ("aten::cat", "aten::copy_", "aten::neg"))


def turn(apply, x, freqs, **options):
    x = x.detach().requires_grad_()
    out = apply(x, freqs, **options)
    (out * torch.arange(out.numel()).view_as(out)).sum().backward()
    return out.detach(), x.grad


def test_rotary_positions_are_those_of_upstream_without_its_copies(monkeypatch):
    upstream = rope_utils._apply_rotary_pos_emb_bshd
    monkeypatch.setattr(rope_utils, "_apply_rotary_pos_emb_bshd", upstream)  # put back afterwards
    cpu.rotary_copies()
    ours = rope_utils._apply_rotary_pos_emb_bshd
    assert ours is not upstream
    angles = torch.randn(11, 1, 1, 4, dtype=torch.float64)
    freqs = torch.cat([angles, angles], -1)
    x = torch.randn(11, 1, 3, 8, dtype=torch.float64)
    wide = torch.randn(11, 1, 3, 12, dtype=torch.float64)  # only part of each head turns
    for tensor, options in ((x, {}), (x, {"mscale": 1.3}), (x, {"rotary_interleaved": True}), (x, {"multi_latent_attention": True}), (wide, {})):
        for found, wanted in zip(turn(ours, tensor, freqs, **options), turn(upstream, tensor, freqs, **options)):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert copies_of(lambda: ours(x, freqs)) == 0
    assert copies_of(lambda: upstream(x, freqs)) >= 3, "upstream turns without copies now: remove the patch rotary-copies"


def test_one_rank_alone_reduces_without_copies(monkeypatch, tmp_path):
    from megatron.core.distributed import param_and_grad_buffer as buffers

    upstream = buffers.dist_reduce_scatter_func
    monkeypatch.setattr(buffers, "dist_reduce_scatter_func", upstream)
    cpu.lone_reduction()
    ours: Any = buffers.dist_reduce_scatter_func
    if dist.is_initialized():
        pytest.fail("another test left a process group behind")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        gradients = torch.arange(6.0)

        def reduce(function):
            with dist.distributed_c10d._coalescing_manager(dist.group.WORLD):
                function(gradients[:6], gradients, op=dist.ReduceOp.SUM, group=dist.group.WORLD, async_op=False)

        assert copies_of(lambda: reduce(ours)) == 0
        assert copies_of(lambda: reduce(upstream)) >= 1, "gloo reduces in place now: remove the patch lone-reduction"
        assert gradients.tolist() == [0, 1, 2, 3, 4, 5]
        other = torch.zeros(6)
        ours(other, gradients, group=dist.group.WORLD)  # not in place: nothing may be skipped
        assert other.tolist() == gradients.tolist()
    finally:
        dist.destroy_process_group()

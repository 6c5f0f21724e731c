"""Fp8Linear inside megatron's DDP: the wgrad kernel adds to the main gradients, and DDP reduces them as it does others."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from ranks import run_ranks

BF16 = torch.bfloat16
MICROBATCHES = 3


def check_reduced_gradients() -> dict[tuple[bool, bool], list[torch.Tensor]]:
    """Main gradients of an FP8 and of a plain layer after three microbatches, by (fused, overlapping reduction)."""
    import torch.distributed as dist
    from megatron.core.transformer import TransformerConfig

    from megalign.kernels.linear import Fp8Linear
    from megalign.parallel.grid import create_grid
    from megalign.parallel.optimizer import wrap_data_parallel

    create_grid()
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, bf16=True)
    results = {}
    for fused in (False, True):
        for overlap in (False, True):
            torch.manual_seed(0)
            model: Any = torch.nn.Sequential(Fp8Linear(128, 256, bias=False, gradient_accumulation_fusion=fused), torch.nn.Linear(256, 64, bias=False, dtype=BF16))
            (wrapped,) = wrap_data_parallel([model], config, use_distributed_optimizer=False, overlap_grad_reduce=overlap)
            wrapped.zero_grad_buffer()
            generator = torch.Generator().manual_seed(dist.get_rank())
            for i in range(MICROBATCHES):
                x, dy = torch.randn(64, 128, generator=generator).to(BF16), torch.randn(64, 64, generator=generator).to(BF16)
                with wrapped.no_sync() if overlap and i < MICROBATCHES - 1 else contextlib.nullcontext():
                    wrapped(x).backward(dy)
            wrapped.finish_grad_sync()
            assert all(p.grad is None and p.main_grad.dtype == torch.float32 for p in model.parameters())
            assert model[0].weight.grad_added_to_main_grad is fused and model[1].weight.grad_added_to_main_grad is False
            results[fused, overlap] = [p.main_grad.clone() for p in model.parameters()]
    return results


def test_main_gradients_are_added_to_once_and_reduced():
    ranks = run_ranks(check_reduced_gradients, 2)
    for own, other in zip(ranks[0].values(), ranks[1].values()):
        assert all(torch.equal(a, b) for a, b in zip(own, other))
    plain, fused = ranks[0][False, False], ranks[0][True, False]
    for overlap in (False, True):
        for expected, kind in ((plain, False), (fused, True)):
            assert all(torch.equal(a, b) for a, b in zip(ranks[0][kind, overlap], expected))
    assert torch.equal(fused[1], plain[1])
    error = float((fused[0] - plain[0]).norm() / fused[0].norm())
    assert 5e-4 < error < 4e-3, error  # what is left out is the rounding of each microbatch's gradient to BF16

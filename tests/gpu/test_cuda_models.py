"""Kernels and memory that only CUDA has: variable-length attention, grouped experts, the offloaded optimizer.

Run by `make test-gpu`; written without a device, and not run so far.
"""

from __future__ import annotations

from typing import Any

import pytest
from ranks import run_ranks

pytestmark = pytest.mark.gpu
BF16 = 2**-7  # of the largest value: two roundings


def attention_errors() -> dict[str, float]:
    """Largest relative difference of output and gradients to one SDPA a document in FP32, for each kernel that is installed."""
    import torch

    from megalign.parallel import varlen

    queries, keys, found = [300, 1, 64, 200], [300, 1, 128, 700], {}
    for value in (64, 96):  # 96: padded to one size
        torch.manual_seed(0)
        q = torch.randn(sum(queries), 8, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        k, v = (torch.randn(sum(keys), 2, size, device="cuda", dtype=torch.bfloat16, requires_grad=True) for size in (64, value))
        exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
        expected = varlen.by_document(exact[0], exact[1], exact[2], queries, keys, causal=True, scale=0.2, dropout=0.0)
        expected.sum().backward()
        for kernel in ("varlen", "flash_attn"):
            if not varlen._installed({"varlen": "torch.nn.attention.varlen"}.get(kernel, kernel)):
                continue
            chosen = varlen.choose_kernel
            varlen.choose_kernel = lambda *_, kernel=kernel: kernel
            out = varlen.attend(q, k, v, queries, keys, causal=True, scale=0.2, dropout=0.0)
            out.sum().backward()
            varlen.choose_kernel = chosen
            for name, one, other in (("out", out, expected), *((n, x.grad, y.grad) for n, x, y in zip("qkv", (q, k, v), exact))):
                assert one is not None and other is not None
                found[f"{kernel} {value} {name}"] = float((one.float() - other).abs().max() / other.abs().max())
            for x in (q, k, v):
                x.grad = None
    return found


def test_variable_length_kernels_equal_one_document_at_a_time():
    found = run_ranks(attention_errors, 1)[0]
    assert any(name.startswith("varlen") for name in found), "torch 2.10 or later has this kernel"
    assert {name: error for name, error in found.items() if error > BF16} == {}


def attention_memory() -> tuple[int, int]:
    """Peak bytes of a packed row of 16384 tokens, forward and backward, and those of one T x T mask."""
    import torch

    from megalign.parallel.varlen import attend

    lengths = [4096] * 4
    q = torch.randn(sum(lengths), 8, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    attend(q, q, q, lengths, lengths, causal=True, scale=None, dropout=0.0).sum().backward()
    return torch.cuda.max_memory_allocated() - before, sum(lengths) ** 2


def test_no_mask_of_tokens_times_tokens():
    peak, mask = run_ranks(attention_memory, 1)[0]
    assert peak < mask


def grouped_errors(counts: list[int]) -> dict[str, float]:
    """Grouped matmuls against one after the other, BF16: output, input gradient, weight gradients."""
    import torch

    from megalign.parallel.experts import _GroupedLinear, use_grouped

    assert use_grouped(None, "cuda", torch.bfloat16, 128, 256)
    torch.manual_seed(0)
    x = torch.randn(sum(counts), 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weights = [torch.randn(256, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in counts]
    ends = torch.tensor(counts, device="cuda").cumsum(0).to(torch.int32)
    out: Any = _GroupedLinear.apply(x, ends, *weights)
    slope = torch.randn_like(out)
    found = [out, *torch.autograd.grad(out, [x, *weights], slope)]
    plain = torch.cat([rows @ weight.t() for rows, weight in zip(x.split(counts), weights)])
    expected = [plain, *torch.autograd.grad(plain, [x, *weights], slope)]
    return {str(i): float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-6)) for i, (a, b) in enumerate(zip(found, expected))}


@pytest.mark.parametrize("counts", [[64, 64], [5, 0, 131, 1], [0, 0, 7]])
def test_grouped_experts_equal_sequential_ones(counts: list[int]):
    assert max(run_ranks(grouped_errors, 1, counts)[0].values()) <= BF16


def device_bytes(offloaded: bool) -> tuple[int, int]:
    """Allocated after two steps in BF16, and the parameters."""
    import torch
    from memory_checks import rows

    from megalign.config.schema import Recipe
    from megalign.sft import token_loss
    from megalign.trainer.engine import Engine
    from megalign.trainer.objective import Objective
    from megalign.trainer.run import grid_of

    model = {"num_layers": 4, "hidden_size": 512, "ffn_hidden_size": 1536, "num_attention_heads": 8}
    optimizer = {"optimizer_cpu_offload": offloaded}
    recipe = Recipe.model_validate({"model": model, "train": {"precision": "bf16", "global_batch_size": 2}, "optimizer": optimizer})
    engine = Engine(recipe, grid_of(recipe, None), 4096)  # pyright: ignore[reportArgumentType]
    for step in (1, 2):
        engine.train_step(rows(recipe, 2, 4096), Objective(token_loss), 1e-4, step)
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated(), sum(p.numel() for chunk in engine.models for p in chunk.parameters())


def test_offloading_frees_masters_and_moments():
    """12 bytes a parameter, less a little for what the allocator rounds."""
    (kept, parameters), (offloaded, _) = (run_ranks(device_bytes, 1, flag)[0] for flag in (False, True))
    assert kept - offloaded > 0.9 * 12 * parameters

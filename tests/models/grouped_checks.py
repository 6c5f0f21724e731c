"""Experts computed together and one after the other, from the same weights."""

from __future__ import annotations

from typing import Any

import torch


def both(count: int, bias: list[float], topk: int, changes: dict[str, Any]) -> list[dict[str, Any]]:
    """Output and gradients of one MoE layer on this rank, sequential and grouped; `bias` steers the router."""
    from moe_checks import layer

    from megalign.parallel.grid import destroy_grid

    found = []
    for grouped in (False, True):
        module = layer(moe_grouped_gemm=grouped, num_moe_experts=len(bias), moe_router_topk=topk, **changes)
        experts = module.experts
        torch.manual_seed(2)
        x = torch.randn(count, 1, 16)
        x[..., 0] = 1.0
        x.requires_grad_()
        with torch.no_grad():
            module.router.weight[:, 0] = torch.tensor(bias)
        rows: list[Any] = []
        experts.register_forward_pre_hook(lambda _, inputs, seen=rows: seen.append(torch.as_tensor(inputs[1]).tolist()))
        out = module(x)[0]
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        grads = {name: parameter.grad for name, parameter in module.named_parameters()}
        found.append({"kind": type(experts).__name__, "rows": rows[0], "out": out.detach(), "x": x.grad, "grads": grads})
        destroy_grid()
    return found


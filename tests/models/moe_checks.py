"""One mixture-of-experts layer of megatron-core as megalign builds it, on one rank or under expert parallelism."""

from __future__ import annotations

from typing import Any

import torch

BASE = dict(num_layers=1, hidden_size=16, ffn_hidden_size=24, num_attention_heads=2, num_moe_experts=4, moe_ffn_hidden_size=12)


def layer(**changes: Any) -> Any:
    """The MoE module of a one-layer model; expert parallelism over the whole world."""
    import torch.distributed as dist

    from megalign.config.schema import ModelConfig
    from megalign.models.build import build_chunks
    from megalign.models.weights import initialise
    from megalign.parallel.grid import create_grid

    grid = create_grid(expert_model_parallel_size=dist.get_world_size())
    model = ModelConfig.model_validate({**BASE, "init_method_std": 0.5, **changes})
    (chunk,) = build_chunks(model, grid, 64)
    initialise([chunk], model, grid, seed=5)
    return chunk.decoder.layers[0].mlp


def expert(module: Any, number: int, x: torch.Tensor) -> torch.Tensor:
    """SwiGLU of one expert by its weights: silu(gate) * up, then down."""
    mlp = module.experts.local_experts[number]
    gate, up = (x @ mlp.linear_fc1.weight.t()).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up) @ mlp.linear_fc2.weight.t()


def check_mixture(topk: int, normalised: bool, experts: int = 4) -> float:
    """P6: largest difference to the mixture written out; for topk = number of experts it is the dense one."""
    module = layer(moe_router_topk=topk, moe_norm_topk_prob=normalised, num_moe_experts=experts)
    torch.manual_seed(0)
    x = torch.randn(9, 2, 16)
    probabilities = (x @ module.router.weight.t()).softmax(-1)
    chosen, index = probabilities.topk(topk, -1)
    weights = torch.zeros_like(probabilities).scatter(-1, index, chosen / chosen.sum(-1, keepdim=True) if normalised else chosen)
    expected = sum(weights[..., e, None] * expert(module, e, x) for e in range(experts))
    return float((module(x)[0] - expected).abs().max())


def check_shared() -> float:
    """P7: output = routed + shared, the shared expert's SwiGLU by its weights."""
    module = layer(moe_shared_expert_intermediate_size=20)
    x = torch.randn(9, 2, 16)
    gate, up = (x @ module.shared_experts.linear_fc1.weight.t()).chunk(2, -1)
    shared = (torch.nn.functional.silu(gate) * up) @ module.shared_experts.linear_fc2.weight.t()
    whole = module(x)[0]
    module.use_shared_expert = False
    return float((whole - (module(x)[0] + shared)).abs().max())


def check_auxiliary_loss() -> dict[str, float]:
    """P8: megatron's load-balancing loss (without coefficient) for random, uniform and collapsed routing."""
    from megatron.core.transformer.moe.moe_utils import (
        clear_aux_losses_tracker,
        get_moe_layer_wise_logging_tracker,
    )

    module = layer(moe_router_topk=1, moe_norm_topk_prob=False, moe_aux_loss_coeff=0.1)
    found = {}
    torch.manual_seed(0)
    tokens = torch.randn(64, 1, 16)
    axes = torch.eye(16)[:4].repeat(16, 1).unsqueeze(1)  # token t points along axis t mod 4
    weight = torch.zeros(4, 16)
    weight[:, :4] = 40 * torch.eye(4)
    constant = tokens.clone()
    constant[..., 0] = 1.0
    one = torch.zeros(4, 16)
    one[2, 0] = 40.0
    for name, router, x in (("random", module.router.weight.detach().clone(), tokens), ("uniform", weight, axes), ("collapsed", one, constant)):
        module.router.weight.data.copy_(router)
        clear_aux_losses_tracker()
        module(x.requires_grad_())
        found[name] = float(get_moe_layer_wise_logging_tracker()["load_balancing_loss"]["values"].sum())
    return found


def check_z_loss() -> tuple[float, float]:
    """P11: megatron's z-loss (without coefficient), and mean logsumexp(logits)^2 (ST-MoE, arXiv:2202.08906, eq. 5)."""
    from megatron.core.transformer.moe.moe_utils import (
        clear_aux_losses_tracker,
        get_moe_layer_wise_logging_tracker,
    )

    module = layer(moe_z_loss_coeff=0.1)
    x = torch.randn(9, 2, 16, requires_grad=True)
    clear_aux_losses_tracker()
    module(x)
    found = get_moe_layer_wise_logging_tracker()["z_loss"]["values"].sum()
    return float(found), float((x @ module.router.weight.t()).logsumexp(-1).square().mean())


def check_padding() -> dict[str, float]:
    """Auxiliary losses of a sequence with padding, cut over the world by sequence parallelism; and the formulas on its real tokens.

    Router gradients are compared as well: those of 0.1 E sum_e f_e P_e + 0.2 mean logsumexp^2, by torch's autograd.
    """
    import torch.distributed as dist
    from megatron.core.transformer.moe.moe_utils import track_moe_metrics

    from megalign.config.schema import ModelConfig
    from megalign.models.build import build_chunks
    from megalign.models.weights import initialise
    from megalign.parallel.grid import create_grid

    world, rank = dist.get_world_size(), dist.get_rank()
    grid = create_grid(tensor_model_parallel_size=world)
    model = ModelConfig.model_validate({**BASE, "init_method_std": 0.5, "moe_aux_loss_coeff": 0.1, "moe_z_loss_coeff": 0.2})
    (chunk,) = build_chunks(model, grid, 64, sequence_parallel=world > 1)
    initialise([chunk], model, grid, seed=5)
    module: Any = chunk.decoder.layers[0].mlp
    torch.manual_seed(0)
    x = torch.randn(12, 1, 16)
    padding = torch.arange(12)[None] >= 7  # the second half is nearly all padding
    x[padding[0]] = 3 * torch.randn(16)

    weight = module.router.weight.detach().clone().requires_grad_()
    logits = x[:7, 0] @ weight.t()
    probabilities = logits.softmax(-1)
    routed = torch.zeros_like(logits).scatter(-1, logits.topk(2, -1).indices, 1.0)
    balance = 4 * (routed.sum(0) / (7 * 2) * probabilities.sum(0) / 7).sum()
    z = logits.logsumexp(-1).square().mean()
    (0.1 * balance + 0.2 * z).backward()

    part = slice(rank * 12 // world, (rank + 1) * 12 // world)
    out = module(x[part].clone().requires_grad_(), padding_mask=padding[:, part])[0]
    (out * 0).sum().backward()
    grad = module.router.weight.grad.clone()
    dist.all_reduce(grad)
    found: dict[str, torch.Tensor] = {}
    names = ["load_balancing_loss", "z_loss"]
    track_moe_metrics(1.0, 0, None, total_loss_dict=found, track_names=names, num_layers=1, pg_collection=grid.process_groups)
    assert weight.grad is not None
    return {
        "balance": float(found["load_balancing_loss"] / balance.detach()) - 1,
        "z": float(found["z_loss"] / z.detach()) - 1,
        "gradient": float((grad - weight.grad).abs().max() / weight.grad.abs().max()),
    }


def check_padding_alone() -> float:
    """Largest router gradient of rows that are padding throughout."""
    moe = layer(moe_aux_loss_coeff=0.1, moe_z_loss_coeff=0.1).train()
    x = torch.randn(8, 1, 16)
    output, _ = moe(x, padding_mask=torch.ones(1, 8, dtype=torch.bool))
    (output * 0).sum().backward()
    return float(moe.router.weight.grad.abs().max())


def check_conservation(dispatcher: str, capacity: float | None) -> dict[str, Any]:
    """P12: experts that return what they get, weighted: every token comes back where it was, or is counted as dropped."""
    import torch.distributed as dist

    from megalign.parallel.grid import create_grid, destroy_grid
    from megalign.trainer.experts import ExpertWatch

    module = layer(moe_token_dispatcher_type=dispatcher, moe_expert_capacity_factor=capacity, moe_router_topk=2)
    destroy_grid()
    grid = create_grid(expert_model_parallel_size=dist.get_world_size())

    class Holder:
        config = module.config

        def modules(self) -> Any:
            return module.modules()

    watch = ExpertWatch([Holder()], grid)
    module.experts.forward = lambda x, counts, probs: (x * probs.unsqueeze(-1), None)
    torch.manual_seed(dist.get_rank())
    x = torch.randn(15, 1, 16)
    watch.start()
    out = module(x)[0]
    routing = watch.collect()
    share = (out / x).mean(-1)  # 1 for a token with both experts
    return {
        "whole": float((out - x).abs().max()),
        "same factor over a token": float(((out / x) - share.unsqueeze(-1)).abs().max()),
        "incomplete": int((share < 1 - 1e-4).sum()),
        "dropped": routing["dropped_tokens"],
        "load": routing["expert_load"],
    }

"""What runs on the ranks for test_reduction.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from layout_checks import Run
from replica_extras import DECLARED, add_extras

MOE = dict(
    num_layers=4, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2, qk_layernorm=True,
    num_moe_experts=4, moe_ffn_hidden_size=48, moe_shared_expert_intermediate_size=32, moe_aux_loss_coeff=0.01,
)  # fmt: skip


def extras_of(run: Run) -> dict[str, torch.Tensor]:
    """Global name (with its shard) -> main gradient, of the extras on this rank; copies on one rank must agree."""
    found: dict[str, torch.Tensor] = {}
    for p in run.placements:
        if p.name.rsplit(".", 1)[-1] not in DECLARED:
            continue
        shard = f"|{run.grid.tensor.rank}" if "tensor" in p.shard else f"|{run.grid.expert_tensor.rank}" if "expert_tensor" in p.shard else ""
        gradient = p.parameter.main_grad.clone()  # pyright: ignore[reportAttributeAccessIssue]
        assert torch.equal(found.setdefault(p.name + shard, gradient), gradient), p.name
    return found


def extra_gradients(layout: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """After `steps` accumulations: gradients of all extras of all ranks (copies checked for equality), the norm, bytes by hooks."""
    from megalign.parallel.grid import destroy_grid

    kinds = options.get("kinds", tuple(DECLARED))
    run = Run(
        {**MOE, **options.get("model", {})},
        layout,
        distributed=options.get("distributed", False),
        overlap=options.get("overlap", False),
        bucket_size=options.get("bucket_size"),
        bf16=options.get("bf16", False),
        hooks=options.get("hooks", True),
        lr=1e-2,
        adam_eps=1e-2,  # smooth: the second step can be held to the same tolerance
        prepare=lambda models, grid: add_extras(models, grid, kinds, options.get("declared")),
    )
    if "without" in options:  # a mutation: these hooks are gone
        for p in run.placements:
            if p.name.rsplit(".", 1)[-1] == options["without"]:
                _disarm(run, p.parameter)
    spent, losses = [], []
    for _ in range(options.get("steps", 2)):
        before = run.reduction.bytes
        losses.append(run.backward())
        spent.append(run.reduction.bytes - before)
        grads = extras_of(run)
        _, norm, _ = run.optimizer.step()
    least = _analytic_bytes(run)
    weights = {p.name: p.parameter.detach().float().clone() for p in run.placements if p.name.endswith(("table", "lora_a", "shared_scale"))}
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, grads)
    merged: dict[str, torch.Tensor] = {}
    spread = 0.0
    for found in everywhere:
        for name, gradient in found.items() if not options.get("distributed") else ():
            spread = max(spread, float((merged.setdefault(name, gradient) - gradient).abs().max()))
    destroy_grid()
    return {"grads": _joined(merged), "norm": float(norm), "losses": losses, "bytes": spent, "least": least, "spread": spread, "weights": weights}


def _joined(merged: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Shards put together: rows of lora_b; gate rows, then up rows, of expert_b."""
    whole: dict[str, torch.Tensor] = {}
    for name in sorted({name.split("|")[0] for name in merged}):
        parts = [merged[key] for key in sorted(merged) if key.split("|")[0] == name]
        if name.endswith("expert_b"):
            whole[name] = torch.cat([torch.cat([part.chunk(2)[half] for part in parts]) for half in (0, 1)])
        else:
            whole[name] = torch.cat(parts) if name.endswith("lora_b") else parts[0]
    return whole


def _analytic_bytes(run: Run) -> int:
    """4 bytes for every element that is partial or duplicated on a group of more than one rank and that megatron does not reduce."""
    total, seen = 0, set()
    for p in run.placements:
        for axis, size in (("tensor", run.grid.tensor.size), ("expert_tensor", run.grid.expert_tensor.size)):
            if p.gradients.get(axis) in ("partial", "duplicated") and size > 1 and "tp-sum" not in p.reducers[axis]:
                total += 4 * p.parameter.numel()
        if len(p.stages) > 1 and p.name not in seen:
            seen.add(p.name)
            total += 4 * p.parameter.numel()
    return total


def _disarm(run: Run, parameter: torch.nn.Parameter) -> None:
    """Take one parameter out of every hook, as if nobody had declared it."""
    for bucket in run.reduction.buckets:
        keep = [i for i, p in enumerate(bucket.parameters) if p is not parameter]
        bucket.parameters, bucket.names = [bucket.parameters[i] for i in keep], [bucket.names[i] for i in keep]
        if not keep:
            bucket.send = bucket.finish = lambda: None  # pyright: ignore[reportAttributeAccessIssue]
    final = [(group, [c for c in copies if all(p is not parameter for p in c)]) for group, copies in run.reduction.final]
    run.reduction.final = [entry for entry in final if entry[1]]


def sweep(cases: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[dict[str, Any]]:
    """`extra_gradients` of several (layout, options) in one launch."""
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

    found = []
    for case in cases:
        get_moe_layer_wise_logging_tracker().clear()
        found.append(extra_gradients(*case))
    return found


def plain_moe(synchronised: bool, layer_changes: dict[str, Any], bf16: bool = False) -> dict[str, Any]:
    """One MoE layer under expert parallelism over the world, no DDP: two microbatches, gradients of everything by global name.

    24 tokens in all, the same on every layout; each rank has its share, and the loss is a sum over all of them.
    """
    from megalign.config.schema import ModelConfig
    from megalign.models.build import build_chunks
    from megalign.models.weights import initialise
    from megalign.parallel.grid import create_grid
    from megalign.parallel.reduction import reduce_in_backward

    world, rank = dist.get_world_size(), dist.get_rank()
    grid = create_grid(expert_model_parallel_size=world)
    shape = dict(num_layers=1, hidden_size=16, ffn_hidden_size=24, num_attention_heads=2, num_moe_experts=4, moe_ffn_hidden_size=12)
    model = ModelConfig.model_validate({**shape, "init_method_std": 0.5, "moe_shared_expert_intermediate_size": 20, **layer_changes})
    (chunk,) = build_chunks(model, grid, 64)
    initialise([chunk], model, grid, seed=5)
    module: Any = chunk.decoder.layers[0].mlp
    if bf16:
        module.bfloat16()
    ep = module.ep_group
    copies = [(name, p) for name, p in module.named_parameters() if ".local_experts." not in f".{name}"]
    hooks = reduce_in_backward(copies, ep, fp32=True, bucket_bytes=1500) if synchronised else None
    numbers = torch.Generator().manual_seed(0)
    x, target = (torch.randn(24, 1, 16, generator=numbers).chunk(world)[rank].to(next(module.parameters()).dtype) for _ in range(2))
    for number, (part, weights) in enumerate(zip(x.chunk(2), target.chunk(2), strict=True)):
        loss = (module(part.clone().requires_grad_())[0] * weights).sum()
        if hooks is not None and number == 0:
            with hooks.no_sync():
                loss.backward()
        else:
            loss.backward()
    first = rank * len(module.experts.local_experts)
    mine = {}
    for name, p in module.named_parameters():
        head, _, tail = name.partition("local_experts.")
        if tail:
            number, _, rest = tail.partition(".")
            name = f"{head}local_experts.{first + int(number)}.{rest}"
        mine[name] = p.grad.float()
    everywhere: list[Any] = [None] * world
    dist.all_gather_object(everywhere, mine)
    spread = max(float((found[name] - everywhere[0][name]).abs().max()) for found in everywhere for name, _ in copies)
    bytes_sent = sum(bucket.bytes for bucket in hooks.buckets) if hooks else 0
    least = sum(4 * p.numel() for _, p in copies) if hooks and world > 1 else 0
    return {"grads": {name: g for found in reversed(everywhere) for name, g in found.items()}, "spread": spread, "bytes": bytes_sent, "least": least}


def plain_sweep(cases: list[Any]) -> list[Any]:
    """`plain_moe` of several cases in one launch."""
    from megalign.parallel.grid import destroy_grid

    found = []
    for case in cases:
        found.append(plain_moe(*case))
        destroy_grid()
    return found

"""What the ranks of test_expert_bias.py run: DeepSeek-V3's router, its expert bias and its groups."""

from __future__ import annotations

from typing import Any, cast

import moe_checks
import torch

SIGMOID = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.01}


def counts_of_real_tokens(tokens: int) -> dict[str, list[float]]:
    """Tokens of each of 4 experts, the last half of the sequence being padding; and counted from what the router returns."""
    module = moe_checks.layer(**SIGMOID)
    torch.manual_seed(0)
    x, padding = torch.randn(tokens, 1, 16), torch.arange(tokens)[:, None] >= tokens // 2
    _, routing = module.router(x, padding)
    counted = module.router.local_tokens_per_expert.tolist()
    return {"counted": counted, "expected": routing[: tokens // 2].sum(0).float().tolist()}


def chosen_experts(score_function: str) -> list[list[int]]:
    """Three of six experts in two groups, of which one may be chosen; the groups lead by different measures."""
    from megatron.core.transformer.moe import router

    # group 0 has the best expert, group 1 the best pair, group 0 the best three
    logits = torch.tensor([[3.0, 0.4, 0.4, 1.4, 1.4, -9.0]])
    _, chosen = router.topk_routing_with_score_function(logits, 3, use_pre_softmax=True, num_groups=2, group_topk=1, score_function=score_function)
    return chosen.nonzero()[:, 1].tolist()


def build_latent() -> str:
    from megalign.config.schema import ModelConfig
    from megalign.models.build import build_chunks
    from megalign.parallel.grid import create_grid

    try:
        build_chunks(ModelConfig.model_validate({"num_layers": 1, "multi_latent_attention": True}), create_grid(), 64)
    except TypeError as error:
        return f"TypeError: {error}"
    return "built"


def trained(layout: dict[str, Any], bf16: bool, tokens: int, steps: int) -> dict[str, Any]:
    """Steps of forward, backward and megatron's update of the biases, with the weights as they are.

    Before: biases that BF16 cannot hold. load: assignments by layer and expert of each step, summed over the world,
    counted here from what the routers return. The tokens prefer some experts: their embedding has a common part.
    """
    import torch.distributed as dist
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.module import Float16Module

    from megalign.config.schema import ModelConfig
    from megalign.models.build import build_chunks
    from megalign.models.weights import initialise
    from megalign.parallel.context import packed_sequences
    from megalign.parallel.grid import create_grid
    from megalign.parallel.optimizer import wrap_data_parallel

    sizes = {key: value for key, value in layout.items() if key != "sequence_parallel"}
    grid = create_grid(**sizes)
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    model = ModelConfig.model_validate({**moe_checks.BASE, **SIGMOID, "num_layers": 2, "init_method_std": 0.3, "moe_layer_freq": [1, 1]})
    (chunk,) = build_chunks(model, grid, 64, sequence_parallel=layout.get("sequence_parallel", False), bf16=bf16)
    initialise([chunk], model, grid, seed=2)
    with torch.no_grad():
        if chunk.pre_process:
            cast(Any, chunk).embedding.word_embeddings.weight.add_(0.5)
    routers: list[Any] = [layer.mlp.router for layer in cast(Any, chunk).decoder.layers]
    for router in routers:
        router.expert_bias.copy_(torch.tensor([0.1001, 0.1002, 0.1003, 0.1004]))
    wrapped: Any = wrap_data_parallel([Float16Module(chunk.config, chunk) if bf16 else chunk], chunk.config, use_distributed_optimizer=False)
    load = torch.zeros(len(routers), 4)

    def count(router: Any, inputs: Any, output: Any) -> None:
        load[routers.index(router)] += output[1].sum(0)

    for router in routers:
        router.register_forward_hook(count)
    found: dict[str, Any] = {"load": [], "bias": [torch.stack([router.expert_bias for router in routers]).clone()]}
    numbers = torch.Generator().manual_seed(grid.data.rank)
    ends = torch.tensor([0, tokens], dtype=torch.int32)
    for _ in range(steps):
        load.zero_()
        ids = torch.randint(0, 64, (1, tokens), generator=numbers)
        wrapped[0].zero_grad_buffer()
        padding = torch.zeros(1, tokens, dtype=torch.bool)
        out = wrapped[0](ids, torch.arange(tokens)[None], None, labels=ids, padding_mask=padding, packed_seq_params=packed_sequences(ends, tokens))
        out[0].sum().backward()
        with torch.no_grad():
            wrapped[0](ids, torch.arange(tokens)[None], None, packed_seq_params=packed_sequences(ends, tokens))  # evaluation counts nothing
        load /= 2
        finalize_model_grads(wrapped)
        total = load.clone()
        dist.all_reduce(total)
        found["load"].append(total)
        found["bias"].append(torch.stack([router.expert_bias for router in routers]).clone())
    found["dtypes"] = {str(router.expert_bias.dtype) for router in routers} | {str(router.local_tokens_per_expert.dtype) for router in routers}
    return found

"""What runs on the ranks for test_composition.py: functions of megatron-core whose results depend on the layout."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

VOCAB, TOKENS, HEADS, SMOOTHING = 8, 6, 4, 0.1


def logits_and_targets() -> tuple[torch.Tensor, torch.Tensor]:
    numbers = torch.Generator().manual_seed(1)
    return torch.randn(TOKENS, 1, VOCAB, generator=numbers), torch.randint(0, VOCAB, (TOKENS, 1), generator=numbers)


def measure() -> dict[str, Any]:
    """On one rank of two: upstream's number, and ours where there is one."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
    from megatron.core.transformer.moe.moe_utils import get_tokens_per_expert_and_token_count

    from megalign.parallel.grid import create_grid, destroy_grid
    from megalign.parallel.vocab import vocab_parallel_logprobs

    grid, found = create_grid(tensor_model_parallel_size=2), {}
    logits, targets = logits_and_targets()
    mine = logits.chunk(2, dim=-1)[grid.tensor.rank]
    found["label smoothing"] = vocab_parallel_cross_entropy(mine.clone(), targets, SMOOTHING).flatten()
    found["gathered logits"] = vocab_parallel_cross_entropy(logits.clone(), targets).flatten()
    weight = torch.eye(VOCAB).chunk(2)[grid.tensor.rank].contiguous()  # hidden states that are the logits
    found["ours"] = vocab_parallel_logprobs(logits[:, 0], weight, targets[:, 0], grid.tensor.group, VOCAB)[0]
    routing = torch.zeros(TOKENS, 2, dtype=torch.bool)
    routing[: 2 + grid.tensor.rank, 0] = True  # 2 tokens here that are no padding, 3 there
    found["masked tokens"] = [float(x) for x in get_tokens_per_expert_and_token_count(routing, grid.tensor.group, topk=1, with_padding_mask=True)[1:]]
    ours = {name: group for name, group in vars(grid.process_groups).items() if isinstance(group, dist.ProcessGroup)}
    globals_ = {
        "tp": parallel_state.get_tensor_model_parallel_group(), "pp": parallel_state.get_pipeline_model_parallel_group(),
        "cp": parallel_state.get_context_parallel_group(), "dp": parallel_state.get_data_parallel_group(), "ep": parallel_state.get_expert_model_parallel_group(),
    }  # fmt: skip
    found["groups of our own"] = [name for name, group in globals_.items() if ours[name] is not group]
    destroy_grid()
    return found


def sinks(layout: dict[str, Any], declared: bool) -> tuple[float, float]:
    """Of a model with one number a head, cut like the heads: the optimizer's gradient norm, and that of this rank's numbers."""
    from cell_checks import _forget
    from layout_checks import Run

    def add(models: Any, grid: Any) -> None:
        from megalign.parallel.placement import declare

        for layer in models[0].decoder.layers:
            core = layer.self_attention.core_attention
            whole = torch.linspace(-0.02, 0.02, HEADS)
            core.softmax_offset = torch.nn.Parameter(whole.chunk(grid.tensor.size)[grid.tensor.rank].clone())
            core.register_forward_hook(lambda module, inputs, output: output * (1 + 50 * module.softmax_offset).repeat_interleave(output.shape[-1] // len(module.softmax_offset)))
            if declared:
                declare(core.softmax_offset, shard="tensor")

    shape = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": HEADS}
    run = Run(shape, layout, distributed=False, hooks=True if declared or not layout else None, prepare=add)
    run.backward()
    named: Any = run.models[0].named_parameters()
    own = sum(p.main_grad.double().square().sum() for name, p in named if name.endswith("softmax_offset"))
    _, norm, _ = run.optimizer.step()
    _forget()
    return float(norm), float(own) ** 0.5


def all_of_them() -> tuple[dict[str, Any], tuple[float, float], tuple[float, float]]:
    layout = dict(tensor_model_parallel_size=2)
    return measure(), sinks(layout, False), sinks(layout, True)

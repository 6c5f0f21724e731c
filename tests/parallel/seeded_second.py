"""The second set of seeded faults: written after the auditor had landed, its verdicts reported as they came out."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.distributed as dist
from seeded_injections import shifted
from seeded_layouts import Fault


def embedding_reduction_gone() -> None:
    """Megatron's sum of the tied table's gradient over its stages."""
    module: Any = importlib.import_module("megatron.core.distributed.finalize_model_grads")

    module._allreduce_word_embedding_grads = lambda *args, **kwargs: None


def sum_becomes_mean() -> None:
    """Megatron's sum over tensor ranks divides by their number."""
    module: Any = importlib.import_module("megatron.core.distributed.finalize_model_grads")

    original = module._allreduce_non_tensor_model_parallel_grads

    def mean(model: Any, config: Any, tp_group: Any = None) -> None:
        original(model, config, tp_group)
        for chunk in model:
            for parameter in chunk.parameters():
                if getattr(parameter, "sequence_parallel", False):
                    parameter.main_grad.div_(tp_group.size())

    module._allreduce_non_tensor_model_parallel_grads = mean


def bias_counts_not_added() -> None:
    """Each rank moves the expert biases by the counts of its own tokens."""
    module: Any = importlib.import_module("megatron.core.distributed.finalize_model_grads")

    def update(counts: Any, bias: Any, rate: float) -> Any:
        return bias + torch.sign(counts.mean(-1, keepdim=True) - counts) * rate

    module.get_updated_expert_bias = update


def another_learning_rate(engine: Any) -> None:
    """One rank's optimizer steps further than the others'."""
    if dist.get_rank() == 1:
        step = engine.optimizer.step

        def further() -> Any:
            for group in engine.optimizer.param_groups:
                group["lr"] *= 1.5
            return step()

        engine.optimizer.step = further


def experts_exchanged(models: Any, grid: Any) -> None:
    """Two experts in the other order on one of the ranks that hold copies of them."""
    if dist.get_rank() == 1:
        for chunk in models:
            for module in chunk.modules():
                if type(module).__name__ == "SequentialMLP":
                    first, second = (module.local_experts[i].linear_fc1.weight for i in (0, 1))
                    kept = first.data.clone()
                    first.data.copy_(second.data)
                    second.data.copy_(kept)


def replaced_parameter(engine: Any) -> None:
    """A new Parameter object in the place of one that DDP and the optimizer know, as a careless load would leave it."""
    norm = engine.models[0].decoder.layers[0].input_layernorm
    norm.weight = torch.nn.Parameter(norm.weight.detach().clone())


def silent_on_one_rank(models: Any, grid: Any) -> None:
    """One data rank's router gives no gradient, to itself and to all before it: the copies agree on sums that lack a part."""
    if dist.get_rank() == 1:
        for chunk in models:
            for module in chunk.modules():
                if type(module).__name__ == "TopKRouter":
                    module.register_forward_hook(lambda module, inputs, output: (output[0].detach(), output[1]))


def norm_over_one_rank(engine: Any) -> None:
    """Each rank adds up the squares of its own gradients alone."""
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    for part in getattr(engine.optimizer, "chained_optimizers", [engine.optimizer]):
        part.get_grad_stats_parallel_group = lambda group=alone: group
        part.grad_stats_parallel_group = alone


def wrong_group() -> None:
    """The hooks' messages go over the data group instead of the tensor group."""
    from megalign.parallel.reduction import Bucket

    finish = Bucket.finish

    def over_data(self: Any) -> None:
        from megatron.core import parallel_state

        self.group = parallel_state.get_data_parallel_group()
        finish(self)

    send = Bucket.send

    def send_over_data(self: Any) -> None:
        from megatron.core import parallel_state

        self.group = parallel_state.get_data_parallel_group()
        send(self)

    Bucket.finish, Bucket.send = over_data, send_over_data


def moment_forgotten(engine: Any) -> None:
    """One rank has begun its second moments anew."""
    if dist.get_rank() == 1:
        for part in getattr(engine.optimizer, "chained_optimizers", [engine.optimizer]):
            for found in part.optimizer.state.values():
                found["exp_avg_sq"].zero_()


SECOND: dict[str, Fault] = {
    "tied table not summed over stages": Fault("tensor, stages, expert", "code", embedding_reduction_gone, "word_embeddings", "MISSING_SUM"),
    "sum over tensor ranks became a mean": Fault("tensor, megatron's sums", "code", sum_becomes_mean, "layernorm|router", "TOO_SMALL", probe=True),
    "expert biases by local counts": Fault("expert", "code", bias_counts_not_added, "expert_bias", "BUFFER"),
    "another learning rate on one rank": Fault("tensor, stages, expert", "running", another_learning_rate, "decoder|embedding", "CHANGED"),
    "experts in another order": Fault("data", "built", experts_exchanged, r"local_experts\.[01]\.linear_fc1", "INITIALISATION"),
    "parameter replaced in a run": Fault("tensor", "running", replaced_parameter, r"layers\.0\.input_layernorm", "LATE"),
    "router silent on one data rank": Fault("data", "built", silent_on_one_rank, "", "WRONG|TOO_SMALL", probe=True),
    "norm of one rank's gradients": Fault("tensor", "made", norm_over_one_rank, "", "NOT_COUNTED|NORM"),
    "hooks reduce over the data group": Fault("tensor, context", "code", wrong_group, "layernorm", "MISSING_SUM"),
    "second moments begun anew": Fault("data", "running", moment_forgotten, "", "MOMENTS"),
    "shared expert's part drawn by data rank": Fault("cut experts", "built", shifted("shared_experts.linear_fc1", rank=0), r"shared_experts\.linear_fc1", "INITIALISATION"),
}  # fmt: skip

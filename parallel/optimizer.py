"""Gradient reduction and AdamW with FP32 masters, both megatron's, behind two functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def wrap_data_parallel(
    chunks: Sequence[Any],
    config: Any,
    *,
    use_distributed_optimizer: bool,
    overlap_grad_reduce: bool = False,
    overlap_param_gather: bool = False,
    bucket_size: int | None = None,
    grad_reduce_in_fp32: bool = True,
) -> list[Any]:
    """Wrap model chunks in megatron's DDP: FP32 main gradients (or of the parameters' dtype), reduced over data-parallel ranks.

    Sets the hooks of `config` (megatron's TransformerConfig) through which the schedule finds them.
    """
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=grad_reduce_in_fp32,
        use_distributed_optimizer=use_distributed_optimizer,
        overlap_grad_reduce=overlap_grad_reduce,
        overlap_param_gather=overlap_param_gather,
        bucket_size=bucket_size,
    )
    wrapped = [DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks)]
    config.finalize_model_grads_func = finalize_model_grads
    if overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
    if overlap_param_gather:
        sync = [chunk.start_param_sync for chunk in wrapped]
        config.param_sync_func = sync if len(wrapped) > 1 else sync[0]
    return wrapped


def create_optimizer(
    chunks: Sequence[Any],
    *,
    bf16: bool,
    use_distributed_optimizer: bool,
    overlap_param_gather: bool = False,
    cpu_offload: bool = False,
    **adam: Any,
) -> Any:
    """Megatron's optimizer over DDP-wrapped chunks: decoupled decay (none on norms and biases), global clip.

    cpu_offload: masters and moments in host memory, see `offload.py`.
    adam: lr, weight_decay, adam_beta1, adam_beta2, adam_eps and clip_grad, as megatron's OptimizerConfig takes them.
    """
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    config = OptimizerConfig(
        optimizer="adam",
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=use_distributed_optimizer,
        overlap_param_gather=overlap_param_gather,
        **adam,
    )
    optimizer = get_megatron_optimizer(config, list(chunks))
    choose_kernel(optimizer)
    for group in optimizer.param_groups:
        # Megatron marks norms and biases with wd_mult 0; its scheduler multiplies (optimizer_param_scheduler.py:294), and ours is another.
        group["weight_decay"] = config.weight_decay * group.get("wd_mult", 1.0)
    if cpu_offload:
        from megalign.parallel.offload import offload

        offload(optimizer)
    return optimizer


def parts_of(optimizer: Any) -> list[Any]:
    """Megatron's optimizers of which this one is made: one, or with experts one for them and one for the rest."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def choose_kernel(optimizer: Any) -> None:
    """Have AdamW take one pass over a parameter and its moments on a CPU, instead of eight; torch's choice on CUDA.

    To be called again after a checkpoint is loaded: the choice is saved with the parameter groups.
    """
    for group in optimizer.param_groups:
        group["fused"] = None if torch.cuda.is_available() else True


def create_states(optimizer: Any) -> None:
    """Give every parameter the Adam state of step 0, so that a checkpoint can be loaded into it.

    torch's AdamW makes its states at the first step, but megatron-core reads them before it loads
    (distrib_optimizer.py:637: exactly one distinct step, so none is an assertion).
    """
    for part in parts_of(optimizer):
        inner = part.optimizer
        for parameter in (p for group in inner.param_groups for p in group["params"]):
            if not inner.state[parameter]:
                inner.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def sharded_optimizer(optimizer: Any, models: dict[str, Any], *, loading: bool, metadata: dict[str, Any]) -> Any:
    """What a checkpoint stores of the optimizer (collective).

    A part may hold no parameter of this rank: the experts' on a pipeline stage of dense layers, or any where the data-parallel
    ranks share out a small model. It has taken no step of its own, yet it is asked for one (distrib_optimizer.py:642: none
    is an assertion), and rank 0's answer is what every rank will load. It is told the step of the others.
    """
    parts = parts_of(optimizer)
    step = max((_step_of(part) for part in parts), default=0.0)  # rank 0 always has one: `freeze` leaves every stage something
    for part in parts:
        state = _inner(part).state
        if hasattr(part, "model_param_group_index_map") and all(key == NO_PARAMETER for key in state):
            state[NO_PARAMETER] = {"step": torch.tensor(step)}  # torch keeps entries whose key is no parameter
    stored = optimizer.sharded_state_dict(models, is_loading=loading, metadata=metadata)
    for part, of_part in zip(parts, _entries(optimizer, stored), strict=True):
        if MASTERS in of_part:  # groups by their number: a list that is empty here and not elsewhere cannot be merged (dict_utils.py:230)
            of_part[MASTERS] = {i: group for i, group in enumerate(of_part[MASTERS]) if group}
        if not loading and step > 0 and not hasattr(part, "model_param_group_index_map"):
            of_part.get("optimizer", of_part)["state"].setdefault("common_step", torch.tensor(step))
    return stored


def load_optimizer(optimizer: Any, stored: Any) -> None:
    """Load what `sharded_optimizer` wanted, once it has been read."""
    for part, of_part in zip(parts_of(optimizer), _entries(optimizer, stored), strict=True):
        if hasattr(part, "fp32_from_float16_groups"):
            groups = of_part.get(MASTERS, {})
            of_part[MASTERS] = [groups.get(i, []) for i in range(len(part.fp32_from_float16_groups))]
    optimizer.load_state_dict(stored)
    choose_kernel(optimizer)


MASTERS = "fp32_from_fp16_params"  # megatron's key, of an optimizer that is not distributed
NO_PARAMETER = "no parameter of this rank"


def _entries(optimizer: Any, stored: Any) -> list[dict[str, Any]]:
    """The parts' entries in the state of all."""
    count = len(parts_of(optimizer))
    return [stored] if count == 1 else [stored[i] for i in range(count)]


def _inner(part: Any) -> Any:
    """torch's optimizer within megatron's, also of an offloaded one."""
    return getattr(part.optimizer, "inner", part.optimizer)


def _step_of(part: Any) -> float:
    return max((float(state["step"]) for key, state in _inner(part).state.items() if key != NO_PARAMETER and "step" in state), default=0.0)


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Set the step's learning rate in every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)


def zero_gradients(chunks: Sequence[Any], optimizer: Any) -> None:
    """Both are needed: without either, the next step's first microbatch counts twice (megatron-core 0.16.1)."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()


def finish_parameters(chunks: Sequence[Any]) -> None:
    """Give every rank the updated parameters now (collective); without overlap_param_gather they are there already.

    With it a step leaves each rank the parameters of its own shard, and the next forward gathers the rest: whoever
    reads them in between (a checkpoint, an export, a comparison of replicas) would read some of the step before.
    """
    for chunk in chunks:
        ddp_config = getattr(chunk, "ddp_config", None)
        if ddp_config is not None and ddp_config.overlap_param_gather and ddp_config.use_distributed_optimizer:
            chunk.start_param_sync(force_sync=True)


def main_gradients(chunks: Sequence[Any]) -> Iterator[tuple[str, Tensor]]:
    """(name, FP32 main gradient) of every parameter of this rank, as DDP has reduced it."""
    for i, chunk in enumerate(chunks):
        prefix = f"chunk{i}." if len(chunks) > 1 else ""
        for name, parameter in chunk.module.named_parameters():
            yield prefix + name.removeprefix("module."), getattr(parameter, "main_grad", parameter.grad)


def gradients_are_finite(chunks: Sequence[Any]) -> bool:
    """One pass over the flat gradient buffers of this rank."""
    buffers = [buffer for chunk in chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    return all(bool(torch.isfinite(buffer.grad_data.sum())) for buffer in buffers)

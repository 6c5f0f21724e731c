"""How the faults of the first set get into a model, a collective or a run: each function makes one (seeded_faults.py)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def named(models: Any, pattern: str) -> list[Any]:
    chunks = models if isinstance(models, list) else models.models
    return [p for chunk in chunks for name, p in chunk.named_parameters() if re.search(pattern, name)]


def flags(pattern: str, **values: Any) -> Callable[..., None]:
    """Attributes of the parameters that match."""

    def set_flags(models: Any, grid: Any) -> None:
        for parameter in named(models, pattern):
            for name, value in values.items():
                setattr(parameter, name, value)

    return set_flags


def shifted(pattern: str, rank: int = 1, by: float = 1e-3) -> Callable[..., None]:
    """One element on one rank."""

    def shift(models: Any, grid: Any = None) -> None:
        if dist.get_rank() == rank:
            for parameter in named(models, pattern):
                parameter.data.view(-1)[0] += by

    return shift


def per_rank_seed(pattern: str) -> Callable[..., None]:
    """Drawn by a generator that each rank seeds with its number."""

    def draw(models: Any, grid: Any) -> None:
        generator = torch.Generator().manual_seed(dist.get_rank())
        for parameter in named(models, pattern):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)

    return draw


def buckets(engine: Any, pattern: str) -> list[Any]:
    return [bucket for bucket in engine.reduction.buckets if any(re.search(pattern, name) for name in bucket.names)]


def our_bucket(change: Callable[[Any], None]) -> Callable[..., None]:
    """A defect in the class of our buckets, in the run and in the probe alike."""

    def code() -> None:
        from megalign.parallel.reduction import Bucket

        change(Bucket)

    return code


def sent_by_nobody(kind: str) -> Callable[..., None]:
    """The hook of one parameter is gone: its bucket goes out without it."""

    def change(bucket: Any) -> None:
        finish = bucket.finish

        def without(self: Any) -> None:
            from megalign.parallel.reduction import gradient_of

            kept = [(p, gradient_of(p).clone()) for name, p in zip(self.names, self.parameters, strict=True) if re.search(kind, name)] if not self.done else []  # pyright: ignore
            finish(self)
            for parameter, gradient in kept:
                gradient_of(parameter).copy_(gradient)  # pyright: ignore

        bucket.finish = without

    return our_bucket(change)


def scaled_sums(factor: float, kind: str = "") -> Callable[..., None]:
    """What our buckets bring back is off by a factor: summed twice, or a mean for a sum."""

    def change(bucket: Any) -> None:
        finish = bucket.finish

        def scaled(self: Any) -> None:
            from megalign.parallel.reduction import gradient_of

            late = not self.done
            finish(self)
            for name, parameter in zip(self.names, self.parameters, strict=True):
                if late and re.search(kind, name):
                    gradient_of(parameter).mul_(factor)  # pyright: ignore

        bucket.finish = scaled

    return our_bucket(change)


def ddp_factor(experts: bool, factor: float) -> Callable[..., None]:
    """DDP scales the gradients of experts, or of all others, by another factor before it adds them up."""

    def code() -> None:
        from megatron.core.distributed import param_and_grad_buffer

        bucket: Any = param_and_grad_buffer._ParamAndGradBucket
        init = bucket.__init__

        def scaled(self: Any, *, params: Any, gradient_scaling_factor: float, **others: Any) -> None:
            expert = not getattr(params[0], "allreduce", True)
            init(self, params=params, gradient_scaling_factor=gradient_scaling_factor * (factor if expert == experts else 1.0), **others)

        bucket.__init__ = scaled

    return code


def loss_scale(factor: float) -> Callable[..., None]:
    """The loss is rescaled for context ranks as if they were data ranks."""

    def code() -> None:
        from megalign.trainer import objective

        original = objective.rescale_for_megatron

        def rescale(*args: Any) -> Any:
            return original(*args) * factor

        objective.rescale_for_megatron = rescale

    return code


def lost_factor(models: Any, grid: Any) -> None:
    """The last norm's own backward loses half of its weight's gradient, on every rank alike."""

    def forward(module: Any, inputs: Any, output: Any) -> Any:
        weight = module.weight / 2 + module.weight.detach() / 2
        return torch.nn.functional.rms_norm(inputs[0], module.normalized_shape, weight.to(inputs[0].dtype), module.eps)

    for chunk in models:
        if chunk.post_process:
            chunk.decoder.final_layernorm.register_forward_hook(forward)


def declared(pattern: str, **how: Any) -> Callable[..., None]:
    """A declaration that is not so."""

    def say(models: Any, grid: Any) -> None:
        from megalign.parallel.placement import declare

        for parameter in named(models, pattern):
            declare(parameter, **how)

    return say


def state(kind: str, pattern: str, rank: int = 1) -> Callable[..., None]:
    """Another value of Adam's state, or of the FP32 master, on one rank."""

    def change(engine: Any) -> None:
        if dist.get_rank() != rank:
            return
        from megalign.models.held import held_by
        from megalign.parallel.audit.held import states

        held = [h for h in held_by(engine.models, engine.grid) if re.search(pattern, h.name)]
        for entry in states(held, engine.optimizer):
            if entry.kind == kind and entry.value.numel():
                entry.value.view(-1)[0] += 1e-2
                return

    return change


def expert_biases(engine: Any) -> list[Any]:
    return [module for model in engine.models for module in model.modules() if getattr(module, "expert_bias", None) is not None]


def bias_in_bf16(engine: Any) -> None:
    """As without the router's line that casts it back (Megatron-LM 1482)."""
    for module in expert_biases(engine):
        module._maintain_float32_expert_bias = lambda: None
        module.expert_bias = module.expert_bias.bfloat16()


def bias_of_one_rank(engine: Any) -> None:
    """As if the counts of this rank had not been added to the others'."""
    if dist.get_rank() == 1:
        expert_biases(engine)[0].expert_bias[0] += 1e-3


def frozen_on_one_rank(pattern: str) -> Callable[..., None]:
    def freeze(engine: Any) -> None:
        if dist.get_rank() == 1:
            for parameter in named(engine, pattern):
                parameter.requires_grad_(False)

    return freeze


def late_parameter(engine: Any) -> None:
    engine.models[0].register_parameter("late_scale", torch.nn.Parameter(torch.ones(8)))


def norm_flag_on_stage(models: Any, grid: Any) -> None:
    """The tied table's copy on the last stage says nothing of being a copy."""
    for parameter in named(models, "output_layer"):
        parameter.shared = False

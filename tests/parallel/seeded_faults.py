"""Seeded faults: training engines that are wrong in one way, for the auditor to find. It knows nothing of this file.

A `Fault` is put in where such faults come from: into the model before its parameters are placed, after that (what user
code or another library would overwrite), into a collective, or into a run between two of the auditor's looks. The auditor
runs as a recipe has it by default: at the start, at the first step and at every hundredth, with the probe where a fault
leaves all copies equal.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

VOCAB = 120
SHAPE = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 2, "qk_layernorm": True}
MOE = {
    **SHAPE, "num_moe_experts": 4, "moe_ffn_hidden_size": 48, "moe_shared_expert_intermediate_size": 32,
    "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True,
}  # fmt: skip
TIED = {**MOE, "share_embeddings_and_output_weights": True, "position_embedding_type": "learned_absolute", "max_position_embeddings": 64}
TP2 = dict(tensor_model_parallel_size=2, sequence_parallel=True)
EP2 = dict(expert_model_parallel_size=2)
PP2 = dict(pipeline_model_parallel_size=2)
PLAIN: dict[str, Any] = dict(use_distributed_optimizer=False)
AFTER: dict[str, Any] = dict(reduce_in_backward=False)  # megatron's finalisation instead of hooks
# name: (ranks, model, section `parallel`, precision)
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any], str]] = {
    "tensor": (2, TIED, TP2, "fp32"),
    "tensor, megatron's sums": (2, TIED, {**TP2, **AFTER}, "fp32"),
    "expert": (2, MOE, EP2, "fp32"),
    "data": (2, MOE, PLAIN, "bf16"),
    "tensor, stages, expert": (4, TIED, {**TP2, **PP2, **EP2, **PLAIN}, "fp32"),
    "stages, data": (4, TIED, PP2, "bf16"),
    "tensor, context": (4, SHAPE, {**TP2, "context_parallel_size": 2}, "fp32"),
    "cut experts": (4, MOE, {**TP2, **EP2, "expert_tensor_parallel_size": 2}, "fp32"),
}
REFUSED = "refused when the parameters are placed"
LATE = 98  # a run is joined here: looked at 98 (its first) and 100, a fault of the run comes at 99


@dataclass(frozen=True)
class Fault:
    """when: "built" (models, grid), "placed" (models, grid), "made" (engine), "running" (engine), or "code" (nothing).

    finding: regular expression of the parameter; cause: the name of a constant of `megalign.parallel.audit.findings`, or
    REFUSED: the probe places the parameters of its copy again, and flags that contradict each other stop it there.
    """

    layout: str
    when: str
    inject: Callable[..., None]
    finding: str
    cause: str
    probe: bool = False


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


FIRST: dict[str, Fault] = {
    # initialisation
    "router drawn per rank": Fault("tensor", "built", per_rank_seed("router.weight"), r"router\.weight", "INITIALISATION"),
    "norm off on one rank": Fault("expert", "built", shifted("layers.0.input_layernorm"), r"layers\.0\.input_layernorm", "INITIALISATION"),
    "shared expert drawn per rank": Fault("expert", "built", per_rank_seed("shared_experts.linear_fc2"), r"shared_experts\.linear_fc2", "INITIALISATION"),
    "cut weight off on a data rank": Fault("stages, data", "built", shifted("layers.0.self_attention.linear_qkv"), r"layers\.\d\.self_attention\.linear_qkv", "INITIALISATION"),
    "tied table drawn per stage": Fault("stages, data", "built", shifted("output_layer", rank=2), "word_embeddings", "INITIALISATION"),
    # flags removed or wrongly set after the model was placed
    "norm flag removed": Fault("tensor, megatron's sums", "placed", flags("layers.1.input_layernorm", sequence_parallel=False), r"layers\.1\.input_layernorm", "MISSING_SUM"),
    "router flag removed": Fault("tensor, megatron's sums", "placed", flags("router.weight", sequence_parallel=False), r"router\.weight", "MISSING_SUM"),
    "final norm flag removed": Fault("tensor, megatron's sums", "placed", flags("final_layernorm", sequence_parallel=False), "final_layernorm", "MISSING_SUM"),
    "dense parameter says it is an expert": Fault("expert", "placed", flags("final_layernorm", allreduce=False), "final_layernorm", "MISSING_SUM"),
    "shared expert says it is an expert": Fault("expert", "placed", flags("shared_experts.linear_fc1", allreduce=False), r"shared_experts\.linear_fc1", "MISSING_SUM"),
    "expert says it is none": Fault("expert", "placed", flags("local_experts", allreduce=True), "local_experts", "REFUSED", probe=True),
    "full gradient summed by flag": Fault("tensor, megatron's sums", "placed", flags("position_embeddings", sequence_parallel=True), "position_embeddings", "TOO_LARGE", probe=True),
    "averaged by flag": Fault("tensor, megatron's sums", "placed", flags("pre_mlp_layernorm", average_gradients_across_tp_domain=True), "pre_mlp_layernorm", "TOO_SMALL", probe=True),
    # hooks
    "hook of norms gone": Fault("tensor", "code", sent_by_nobody("input_layernorm"), "input_layernorm", "MISSING_SUM"),
    "hook of the router gone": Fault("tensor", "code", sent_by_nobody("router"), r"router\.weight", "MISSING_SUM"),
    "hook of the final norm gone": Fault("tensor, stages, expert", "code", sent_by_nobody("final_layernorm"), "final_layernorm", "MISSING_SUM"),
    "hook gone, with context": Fault("tensor, context", "code", sent_by_nobody("pre_mlp_layernorm"), "pre_mlp_layernorm", "MISSING_SUM"),
    "hooks reduce twice": Fault("tensor", "code", scaled_sums(2.0), "layernorm|router", "TOO_LARGE", probe=True),
    "hooks average": Fault("cut experts", "code", scaled_sums(0.5), "layernorm|router", "TOO_SMALL", probe=True),
    # declarations
    "full gradient declared partial": Fault("tensor", "built", declared("position_embeddings", tensor="partial"), "position_embeddings", "TOO_LARGE", probe=True),
    "partial gradient declared full": Fault("tensor", "built", declared("layers.0.pre_mlp_layernorm", tensor="full"), r"layers\.0\.pre_mlp_layernorm", "NOT_EQUAL"),
    "partial gradient declared duplicated": Fault("tensor", "built", declared("router.weight", tensor="duplicated"), r"router\.weight", "TOO_SMALL", probe=True),
    # factors in DDP, in the loss, in a layer
    "experts summed without a mean": Fault("expert", "code", ddp_factor(True, 2.0), "local_experts", "TOO_LARGE", probe=True),
    "experts averaged twice": Fault("cut experts", "code", ddp_factor(True, 0.5), "local_experts", "TOO_SMALL", probe=True),
    "dense gradients summed without a mean": Fault("data", "code", ddp_factor(False, 2.0), "layernorm|linear|embedding|router|output_layer", "TOO_LARGE", probe=True),
    "context ranks taken for data ranks": Fault("tensor, context", "code", loss_scale(2.0), "layernorm|linear|embedding|output_layer", "TOO_LARGE", probe=True),
    "a layer loses a factor": Fault("expert", "built", lost_factor, "final_layernorm", "TOO_SMALL", probe=True),
    # the norm
    "copies counted on every tensor rank": Fault("tensor", "placed", flags("input_layernorm", tensor_model_parallel=True), "input_layernorm", "COUNTED_TWICE"),
    "a cut weight counted on one rank": Fault("tensor", "placed", flags("linear_qkv", tensor_model_parallel=False), "linear_qkv", "NOT_COUNTED"),
    "an expert left out of the norm": Fault("cut experts", "placed", flags("local_experts.0.linear_fc1", shared=True), r"local_experts\.\d\.linear_fc1", "NOT_COUNTED"),
    "tied table counted on both stages": Fault("tensor, stages, expert", "placed", norm_flag_on_stage, "word_embeddings", "COUNTED_TWICE"),
    # in a run
    "expert bias in BF16": Fault("data", "running", bias_in_bf16, "expert_bias", "LOW_PRECISION"),
    "expert bias of one rank": Fault("tensor", "running", bias_of_one_rank, "expert_bias", "BUFFER"),
    "first moment diverged": Fault("data", "running", state("exp_avg", r"layers\.1\.mlp\.router\.weight"), r"layers\.1\.mlp\.router\.weight", "MOMENTS"),
    "second moment diverged": Fault("tensor", "running", state("exp_avg_sq", "final_layernorm"), "final_layernorm", "MOMENTS"),
    "master weight diverged": Fault("data", "running", state("master", r"layers\.0\.input_layernorm"), r"layers\.0\.input_layernorm", "MASTERS"),
    "weight changed outside the optimizer": Fault("tensor, stages, expert", "running", shifted(r"layers\.0\.mlp\.router\.weight"), r"layers\.\d\.mlp\.router\.weight", "CHANGED"),
    "frozen on one rank": Fault("tensor", "running", frozen_on_one_rank("layers.1.pre_mlp_layernorm"), r"layers\.1\.pre_mlp_layernorm", "FROZEN"),
    "added late": Fault("data", "running", late_parameter, "late_scale", "LATE"),
}  # fmt: skip


# The second set: written after the auditor had landed, its verdicts reported as they came out.


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
FAULTS = {**FIRST, **SECOND}


def recipe_of(layout: str, probe: bool) -> Any:
    from megalign.config.schema import Recipe

    _, model, parallel, precision = LAYOUTS[layout]
    return Recipe.model_validate(
        {
            "model": model,
            "parallel": parallel,
            "train": {"precision": precision, "global_batch_size": 8},
            "optimizer": {"lr": 1e-3},
            "data": {"sequence_length": 48},
            "audit": {"probe": probe},
        }
    )


def engine_of(layout: str, fault: Fault | None) -> Any:
    """The engine of a recipe with the fault in it, on a new grid (collective)."""
    from megalign.parallel.grid import create_grid
    from megalign.trainer import engine, probing

    recipe = recipe_of(layout, fault is not None and fault.probe)
    keys = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size")
    grid = create_grid(**{key: getattr(recipe.parallel, key) for key in keys})
    if fault is not None and fault.when == "code":
        fault.inject()
    if fault is not None and fault.when in ("built", "placed"):
        for module in (engine, probing):
            _around_place(module, fault)
    made = engine.Engine(recipe, grid, VOCAB)
    if fault is not None and fault.when == "made":
        fault.inject(made)
    return made


def _around_place(module: Any, fault: Fault) -> None:
    place = module.place

    def tampered(models: Any, *args: Any, **kwargs: Any) -> Any:
        first = not getattr(models[0], "tampered", False)  # the probe's copy was tampered with when it was copied
        if fault.when == "built" and first:
            fault.inject(list(models), args[1])
            models[0].tampered = True
        found = place(models, *args, **kwargs)
        if fault.when == "placed":
            fault.inject(list(models), args[1])
        return found

    module.place = tampered


def batches_of(engine: Any, rows: int) -> list[Any]:
    from megalign.trainer.probing import random_batches

    return random_batches(engine.grid, VOCAB, rows)


def _changed_by_faults() -> list[tuple[Any, str]]:
    finalize_model_grads = importlib.import_module("megatron.core.distributed.finalize_model_grads")  # the package has a function of that name
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucket

    from megalign.parallel.reduction import Bucket
    from megalign.trainer import engine, objective, probing

    places = [(module, "place") for module in (engine, probing)]
    names = ("_allreduce_word_embedding_grads", "_allreduce_non_tensor_model_parallel_grads", "get_updated_expert_bias")
    places += [(finalize_model_grads, name) for name in names]
    return [(Bucket, "finish"), (Bucket, "send"), (_ParamAndGradBucket, "__init__"), (objective, "rescale_for_megatron"), *places]


def audits(cases: list[tuple[str, str | None, int]]) -> list[list[tuple[str, str, bool]]]:
    """`audit` of (layout, name of a fault or None, steps), one after the other in one launch."""
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

    from megalign.parallel.grid import destroy_grid
    from megalign.parallel.placement import PlacementError

    found = []
    for layout, name, steps in cases:
        kept = [(owner, attribute, getattr(owner, attribute)) for owner, attribute in _changed_by_faults()]
        get_moe_layer_wise_logging_tracker().clear()
        try:
            found.append(audit(layout, None if name is None else FAULTS[name], steps))
        except PlacementError as error:
            found.append([(str(error).partition(":")[0], REFUSED, False)])
        except Exception as error:  # all ranks fail alike, or the launch times out
            found.append([("", f"{type(error).__name__}: {error}", False)])
        destroy_grid()
        for owner, attribute, value in kept:
            setattr(owner, attribute, value)
    return found


def audit(layout: str, fault: Fault | None, steps: int = 1) -> list[tuple[str, str, bool]]:
    """What the auditor says of a run: (parameter, cause, follows), in its order."""
    from megalign.losses import cross_entropy_loss
    from megalign.trainer.metrics import NullLogger
    from megalign.trainer.objective import Objective
    from megalign.trainer.probing import probe_engine

    engine = engine_of(layout, fault)
    batches = batches_of(engine, 2)
    objective = Objective(lambda output, batch: cross_entropy_loss(*output))

    def step(number: int) -> list[Any]:
        engine.train_step(batches, objective, 1e-3, number)
        return list(engine.audit.auditor.last) if engine.audit.auditor.due(number) else []

    found: list[Any] = []
    if fault is not None and fault.probe:
        found += probe_engine(engine, VOCAB)
    running = fault is not None and fault.when == "running"
    first = LATE if running else 1
    engine.audit.start(first - 1, NullLogger())
    found += engine.audit.auditor.last
    found += step(first)
    if fault is not None and running:
        assert not found, found
        fault.inject(engine)
        step(LATE + 1)
        found += step(LATE + 2)
    for number in range(first + 1, steps + 1):
        found += step(number)
    return [(finding.parameter, finding.cause, finding.follows) for finding in found]


def judged(name: str, found: list[tuple[str, str, bool]]) -> tuple[str, str]:
    """(verdict, name of the cause that was found): "caught", or what is amiss. Findings that follow from another do not count;
    of the others the first must have the cause, and all the parameter (or be the global norm, which follows from any)."""
    from megalign.parallel.audit import findings

    names = {value: key for key, value in vars(findings).items() if isinstance(value, str) and key.isupper()} | {REFUSED: "REFUSED"}
    fault = FAULTS[name]
    roots = [(parameter, cause) for parameter, cause, follows in found if not follows]
    if not roots:
        return "missed", "-"
    cause = names.get(roots[0][1], roots[0][1])
    strangers = [parameter for parameter, _ in roots if not re.search(fault.finding, parameter.replace(".*.", ".0.")) and parameter != "gradient norm"]
    if strangers:
        return f"another parameter: {strangers[0]}", cause
    return ("caught" if cause in fault.cause.split("|") else "another cause"), cause


def clean_cells(cells: list[Any], bf16: bool, steps: int, interval: int) -> list[list[tuple[str, str]]]:
    """What the auditor says of cells of the layout matrix without a fault: (parameter, cause)."""
    from cell_checks import SMOOTH, _forget
    from layout_checks import Run

    from megalign.models.held import held_by
    from megalign.parallel.audit.auditor import Auditor

    said = []
    for cell in cells:
        run = Run(
            cell.model_config(),
            cell.layout(),
            distributed=cell.distributed,
            overlap="gradients" in cell.overlap,
            overlap_param_gather="parameters" in cell.overlap,
            bucket_size=None if cell.overlap == "none" else 5000,
            rows=cell.microbatches,
            document_multiple=cell.document_multiple,
            bf16=bf16,
            **SMOOTH,
        )
        auditor = Auditor(run.grid, lambda run=run: held_by(run.models, run.grid), run.chunks, run.optimizer, run.placements, interval=interval)
        found = auditor.start()
        for step in range(1, steps + 1):
            run.backward()
            if auditor.due(step):
                found = found + auditor.before_update(step)
            run.optimizer.step()
        said.append([(finding.parameter, finding.cause) for finding in found])
        _forget()
    return said

"""Known errors of megatron-core and its neighbours, each as one defect put into a correct run.

A `Bug` names its thread, the layout on which it shows, and the function that brings it back: a flag that our layer spec
sets and others forget, a rule by name that does not know the name, a reduction that nobody makes. A defect may also be
a module as users add it (value head, LoRA): then the wrong run leaves it as upstream treats it, and the right one declares it.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

SHAPE = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 2}
DENSE = {**SHAPE, "qk_layernorm": True}
MOE = {
    **DENSE, "num_moe_experts": 4, "moe_ffn_hidden_size": 48, "moe_shared_expert_intermediate_size": 32, "moe_aux_loss_coeff": 0.01,
}  # fmt: skip
LEARNED = {"position_embedding_type": "learned_absolute", "share_embeddings_and_output_weights": True}
GATE = {"moe_shared_expert_gate": True}
TP2 = dict(tensor_model_parallel_size=2)
TP2_SP = dict(tensor_model_parallel_size=2, sequence_parallel=True)
PP2 = dict(pipeline_model_parallel_size=2)
EP2 = dict(expert_model_parallel_size=2)

Models = list[Any]
Prepare = Callable[[Models, Any], None]


@dataclass(frozen=True)
class Bug:
    """wrong, right: functions of (models, grid) called before parameters are placed and wrapped."""

    thread: str
    model: dict[str, Any]
    layout: dict[str, Any]
    parameters: str  # regular expression: exactly the parameters whose gradient is wrong (norm_only: that are counted twice)
    wrong: Prepare
    right: Prepare | None = None
    world: int = 2
    distributed: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    norm_only: bool = False  # every gradient is right, their norm is not
    document_multiple: int = 1


def _each(models: Models, pattern: str) -> list[Any]:
    found = [p for chunk in models for name, p in chunk.named_parameters() if re.search(pattern, name)]
    return found


def without_flag(pattern: str) -> Prepare:
    """Parameters that do not say that they see this rank's tokens alone."""

    def forget(models: Models, grid: Any) -> None:
        for parameter in _each(models, pattern):
            parameter.sequence_parallel = False

    return forget


def with_flag(pattern: str, **flags: Any) -> Prepare:
    """Parameters that say what is not so."""

    def claim(models: Models, grid: Any) -> None:
        for parameter in _each(models, pattern):
            for name, value in flags.items():
                setattr(parameter, name, value)

    return claim


def unknown_norms(models: Models, grid: Any) -> None:
    """Per-head norms that megatron's rule does not know, as under another name (finalize_model_grads.py:288)."""
    models[0].config.qk_layernorm = False


def stages_cut_apart(models: Models, grid: Any) -> None:
    """The tied table is cut by the distributed optimizer with its neighbours, on each stage with others (param_and_grad_buffer.py:707)."""
    for parameter in _each(models, "word_embeddings|output_layer"):
        del parameter.shared_embedding


# Modules that users add. Their parameters depend on their names alone, like the model's (weights.initialise).


def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
    from hashlib import sha256

    generator = torch.Generator().manual_seed(int.from_bytes(sha256(name.encode()).digest()[:7], "big"))
    return torch.empty(shape).normal_(0, 0.1, generator=generator)


def known_cuts() -> None:
    """How the added parameters are cut, for the comparison."""
    from megalign.models.hf import shards

    layer = "decoder.layers.{layer}."
    shards.CUTS |= {
        "value_head.weight": shards.Whole,
        "layer_scale": shards.Whole,
        layer + "self_attention.linear_proj.lora_a": shards.Columns,
        layer + "self_attention.linear_proj.lora_b": shards.Whole,
        layer + "self_attention.linear_qkv.lora_a": shards.Whole,
        layer + "self_attention.linear_qkv.lora_b": shards.Rows,
    }


class ValueHead(torch.nn.Module):
    """One number for each hidden state, added to it: the gradient is that of a head whose loss sees every token."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = torch.nn.Parameter(drawn("value_head", (1, size)))

    def forward(self, module: Any, inputs: Any, hidden: Tensor) -> Tensor:
        return hidden + torch.nn.functional.linear(hidden, self.weight)


def value_head(declared: bool) -> Prepare:
    def add(models: Models, grid: Any) -> None:
        known_cuts()
        for chunk in models:
            if chunk.post_process:
                chunk.value_head = ValueHead(chunk.config.hidden_size)
                chunk.decoder.final_layernorm.register_forward_hook(chunk.value_head.forward)
                if declared:
                    from megalign.parallel.placement import declare

                    declare(chunk.value_head.weight, tensor="sequence")

    return add


RANK = 4


def lora(declared: bool) -> Prepare:
    """Adapters of the projections of attention: one factor cut like the layer, one whole on every rank."""

    def add(models: Models, grid: Any) -> None:
        from megatron.core.tensor_parallel.mappings import (
            copy_to_tensor_model_parallel_region,
            gather_from_sequence_parallel_region,
            reduce_from_tensor_model_parallel_region,
            reduce_scatter_to_sequence_parallel_region,
        )

        known_cuts()
        size, rank, tokens_cut = grid.tensor.size, grid.tensor.rank, models[0].config.sequence_parallel

        def of_rows(layer: Any, inputs: Any, output: Any) -> Any:
            part = torch.nn.functional.linear(inputs[0], layer.lora_a)
            low = (reduce_scatter_to_sequence_parallel_region if tokens_cut else reduce_from_tensor_model_parallel_region)(part, group=grid.tensor.group)
            return output[0] + torch.nn.functional.linear(low, layer.lora_b), output[1]

        def of_columns(layer: Any, inputs: Any, output: Any) -> Any:
            low = torch.nn.functional.linear(inputs[0], layer.lora_a)
            if tokens_cut:
                low = gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True, group=grid.tensor.group)
            else:
                low = copy_to_tensor_model_parallel_region(low, group=grid.tensor.group)
            return output[0] + torch.nn.functional.linear(low, layer.lora_b), output[1]

        for chunk in models:
            for block in chunk.decoder.layers:
                proj, qkv = block.self_attention.linear_proj, block.self_attention.linear_qkv
                number = block.layer_number
                proj.lora_a = torch.nn.Parameter(drawn(f"{number} proj a", (RANK, proj.weight.shape[1] * size)).chunk(size, 1)[rank].contiguous())
                proj.lora_b = torch.nn.Parameter(drawn(f"{number} proj b", (proj.weight.shape[0], RANK)))
                qkv.lora_a = torch.nn.Parameter(drawn(f"{number} qkv a", (RANK, qkv.weight.shape[1])))
                qkv.lora_b = torch.nn.Parameter(drawn(f"{number} qkv b", (qkv.weight.shape[0] * size, RANK)).chunk(size, 0)[rank].contiguous())
                for cut in (proj.lora_a, qkv.lora_b):
                    setattr(cut, "tensor_model_parallel", True)  # noqa: B010
                proj.register_forward_hook(of_rows)
                qkv.register_forward_hook(of_columns)
                if declared:
                    from megalign.parallel.placement import declare

                    declare(proj.lora_b, tensor="sequence")
                    declare(qkv.lora_a, tensor="sequence")

    return add


def layer_scale(declared: bool) -> Prepare:
    """One parameter that every layer uses, so that every stage holds a copy of it."""

    def add(models: Models, grid: Any) -> None:
        known_cuts()
        for chunk in models:
            chunk.layer_scale = torch.nn.Parameter(drawn("scale", (chunk.config.hidden_size,)))
            for block in chunk.decoder.layers:
                block.mlp.register_forward_hook(lambda module, inputs, out, scale=chunk.layer_scale: (out[0] * (1 + scale), out[1]))
            if declared:
                from megalign.parallel.placement import declare

                declare(chunk.layer_scale, tensor="sequence", pipeline="partial")

    return add


BUGS: dict[str, Bug] = {
    "router": Bug(
        "Megatron-LM 599", MOE, TP2_SP, r"router\.weight", without_flag(r"router\.weight"), options=GATE),
    "shared-expert gate": Bug(
        "Pai-Megatron-Patch 397", MOE, TP2_SP, r"gate_weight", without_flag("gate_weight"), options=GATE),
    "final layernorm": Bug(
        "Megatron-LM 1446", MOE, TP2_SP, r"final_layernorm", without_flag("final_layernorm"), options=GATE),
    "layernorms": Bug(
        "megatron.md: norms without the attribute", MOE, TP2_SP, r"(input|pre_mlp)_layernorm", without_flag("(input|pre_mlp)_layernorm"), options=GATE),
    "expert flag": Bug(
        "Megatron-LM 5916, 6080, 1622", MOE, TP2_SP, r"local_experts", with_flag("local_experts", allreduce=True), options=GATE),
    "norm of copies": Bug(
        "NeMo-RL 3788", MOE, TP2_SP, "layernorm|router|gate_weight", with_flag("layernorm|router|gate_weight", tensor_model_parallel=True), options=GATE, norm_only=True),
    "per-head norms": Bug(
        "Megatron-LM 816", DENSE, TP2, r"[qk]_layernorm", unknown_norms),
    "value head": Bug(
        "NeMo-RL 2530, 2839", DENSE, TP2_SP, r"value_head", value_head(False), value_head(True)),
    "LoRA factor": Bug(
        "mcore-bridge 173", DENSE, TP2_SP, r"proj\.lora_b|qkv\.lora_a", lora(False), lora(True)),
    "position embedding, tagged": Bug(
        "megatron.md: position embedding", LEARNED | DENSE, TP2_SP, "position_embeddings", with_flag("position_embeddings", sequence_parallel=True)),
    "position embedding as an expert": Bug(
        "megatron.md: mis-tagged allreduce=False", LEARNED | MOE, EP2, "position_embeddings", with_flag("position_embeddings", allreduce=False)),
    "copied on several stages": Bug(
        "megatron.md: parameters copied on several stages", DENSE, PP2, "layer_scale", layer_scale(False), layer_scale(True)),
    "tied embedding, distributed": Bug(
        "Megatron-LM 844", LEARNED | DENSE, PP2, "word_embeddings", stages_cut_apart, world=4, distributed=True),
    "layernorm with context parallelism": Bug(
        "Megatron-LM 1528", DENSE, {**TP2_SP, "context_parallel_size": 2}, "input_layernorm", without_flag("input_layernorm"),
        world=4, document_multiple=4),
}  # fmt: skip


def gradients_of(bug: Bug, prepare: Prepare | None, layout: dict[str, Any], hooks: bool | None) -> Any:
    """The `Run` of a bug's model with `prepare`, after its backward pass, and its gradient norm (collective)."""
    from layout_checks import Run

    run = Run(
        bug.model,
        layout,
        distributed=bug.distributed and bool(layout),
        document_multiple=bug.document_multiple,
        options=bug.options,
        prepare=prepare,
        hooks=hooks,
    )
    return run, run.backward()


def oracles(names: list[str]) -> dict[str, dict[str, Any]]:
    """One process: {"loss", "norm", "grads"} of every bug's model without the defect."""
    from cell_checks import _forget, _parameters

    found = {}
    for name in names:
        bug = BUGS[name]
        run, loss = gradients_of(bug, bug.right, {}, None)
        grads = {at: parameter.main_grad.clone() for at, parameter, _ in _parameters(run)}
        _, norm, _ = run.optimizer.step()
        found[name] = {"loss": loss, "norm": float(norm), "grads": grads}
        _forget()
    return found


def refusals(names: list[str]) -> dict[str, str]:
    """What placing the parameters says of each defect on this rank, or "" where nothing is wrong with the flags alone."""
    from cell_checks import _forget

    from megalign.parallel.placement import PlacementError

    found = {}
    for name in names:
        bug, found[name] = BUGS[name], ""
        try:
            gradients_of(bug, bug.wrong, bug.layout, True)
        except PlacementError as error:
            found[name] = str(error)
        _forget()
    return found


def study(names: list[str], pickled: bytes) -> dict[str, dict[str, dict[str, Any]]]:
    """On each rank, for each bug: what is wrong {"errors": parameter -> times the tolerance, "norm", "loss"} in both runs."""
    from cell_checks import _forget, gather_gradients, gradient_errors

    expected = pickle.loads(pickled)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name in names:
        bug = BUGS[name]
        for way, prepare, hooks in (("wrong", bug.wrong, None), ("right", bug.right, True)):
            run, loss = gradients_of(bug, prepare, bug.layout, hooks)
            gather_gradients(run.chunks)
            errors = dict(gradient_errors(run, expected[name]["grads"]))
            _, norm, _ = run.optimizer.step()
            found.setdefault(name, {})[way] = {
                "errors": {at: ratio for at, ratio in errors.items() if not ratio <= 1},
                "norm": float(norm) / expected[name]["norm"],
                "loss": abs(loss / expected[name]["loss"] - 1),
                "compared": len(errors),
            }
            _forget()
    dist.barrier()
    return found


# What is wrong on a schedule or from step to step, in each a whole run; (world, function -> largest gradient error).


def _worst_of(run: Any, expected: dict[str, Tensor]) -> float:
    from cell_checks import gradient_errors

    run.backward()
    return max(ratio for _, ratio in gradient_errors(run, expected))


def _interleaved(**config: bool) -> Callable[[Any], None]:
    def change(run: Any) -> None:
        for chunk in run.chunks:
            for name, value in config.items():
                setattr(chunk.module.config, name, value)

    return change


def _second_step(run: Any, forgotten: str) -> None:
    """A step (of size 0) whose gradients stay, because one of the two zeroings is left out of the next."""
    from megalign.parallel import optimizer

    optimizer.set_learning_rate(run.optimizer, 0.0)
    run.step()
    zero = {
        "buffers": lambda chunks, optimizer: optimizer.zero_grad(),
        "parameters": lambda chunks, optimizer: [chunk.zero_grad_buffer() for chunk in chunks],
    }
    optimizer.zero_gradients = zero[forgotten]  # this process is a fork of its own


def _scaled_by_data_alone(run: Any) -> None:
    """As if context ranks were data ranks: loss * (microbatches * DP * CP), though the schedule multiplies by CP itself (schedules.py:265)."""
    from megalign.trainer import objective

    def rescale(loss_sum: Tensor, global_tokens: Any, num_microbatches: int, grid: Any) -> Tensor:
        return loss_sum * (num_microbatches * grid.data_context.size / global_tokens)

    objective.rescale_for_megatron = rescale


def _predictions_counted_by_each_rank(run: Any) -> None:
    """The loss of prediction modules divided by the tokens of this rank (Megatron-LM 7452, finding 3: process_mtp_loss)."""
    from megalign.batch import look_ahead
    from megalign.trainer import objective

    upstream = objective.denominators

    def denominators(microbatches: Any, count: Any, depths: int, grid: Any) -> Any:
        counts = upstream(microbatches, count, depths, grid)
        mine = [sum(int(look_ahead(batch, k + 1).loss_mask.sum()) for batch in microbatches) for k in range(depths)]
        return objective.Denominators(counts.count, counts.tokens, [float(count) * grid.data.size for count in mine])

    objective.denominators = denominators


FOUR_LAYERS = {**SHAPE, "num_layers": 4, "mtp_num_layers": 1}
INTERLEAVED = {**PP2, "virtual_pipeline_model_parallel_size": 2}
SCHEDULES: dict[str, tuple[dict[str, Any], int, Callable[[Any], None]]] = {
    "batched communication of virtual stages": (INTERLEAVED, 1, _interleaved(batch_p2p_comm=True)),
    "outputs of virtual stages freed while they are sent": (
        INTERLEAVED, 1, _interleaved(batch_p2p_comm=False, overlap_p2p_comm=True, deallocate_pipeline_outputs=True)),
    "context ranks taken for data ranks": (dict(context_parallel_size=2), 4, _scaled_by_data_alone),
    "prediction modules' tokens counted by each rank": (dict(), 1, _predictions_counted_by_each_rank),
    "gradient buffers not zeroed": (dict(), 1, lambda run: _second_step(run, "buffers")),
    "gradients of parameters not zeroed": (dict(), 1, lambda run: _second_step(run, "parameters")),
}  # fmt: skip


def schedule_oracle(multiple: int) -> dict[str, Tensor]:
    from cell_checks import _parameters
    from layout_checks import Run

    run = Run(FOUR_LAYERS, {}, distributed=False, document_multiple=multiple)
    run.backward()
    return {name: parameter.main_grad.clone() for name, parameter, _ in _parameters(run)}


def schedule_error(name: str, pickled: bytes) -> tuple[float, float]:
    """(with the defect, without): largest gradient error on this rank, in units of the tolerance."""
    from cell_checks import _forget
    from layout_checks import Run

    layout, multiple, defect = SCHEDULES[name]
    expected = pickle.loads(pickled)
    right = _worst_of(Run(FOUR_LAYERS, layout, distributed=False, document_multiple=multiple), expected)
    _forget()
    run = Run(FOUR_LAYERS, layout, distributed=False, document_multiple=multiple)
    defect(run)
    return _worst_of(run, expected), right

"""Where every parameter lies: cut over which axes, copied over which, and what each copy's gradient is there.

A parameter that several ranks hold stays equal on them only if its gradient does. On an axis of the grid the gradient of a
copy is one of:

    full        every rank computed the whole of it: nothing to do
    partial     each rank has a part (its tokens, its heads): the sum is the gradient
    duplicated  each rank has a part times the size of the group, because the backward of its layer all-reduces: the mean is

Over data and context ranks it is always partial, and megatron's DDP adds it up. This module settles the other axes, one
reducer for each. Model code says it in one line, `declare(head.weight, tensor="partial")`; what says nothing is inferred
from the modules of our layer spec and megatron's attributes where they leave no doubt, and refused by name where they do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.distributed as dist

from megalign.parallel.grid import Grid

Gradient = Literal["full", "partial", "duplicated"]
# What a declaration may say besides: partial where sequence parallelism cuts the tokens of the group, else full.
Declared = Literal["full", "partial", "duplicated", "sequence"]
Axis = Literal["tensor", "expert_tensor", "pipeline"]

DDP, TENSOR_SUM, TENSOR_MEAN, EMBEDDING, HOOK, FINAL_HOOK, NOBODY = (
    "megatron DDP",
    "megatron tp-sum",
    "megatron tp-mean",
    "megatron embedding group",
    "hook in backward",
    "hook after backward",
    "-",
)


class PlacementError(RuntimeError):
    """Parameters whose reduction is not settled, each by name with the line that settles it."""


@dataclass(frozen=True)
class Declaration:
    """What model code says of a parameter, for any layout."""

    shard: tuple[str, ...] = ()
    gradients: dict[str, Declared] = field(default_factory=dict)


@dataclass(frozen=True)
class Placement:
    """One parameter on this rank's grid."""

    name: str
    parameter: torch.nn.Parameter
    shard: tuple[str, ...]  # axes over which it is cut
    gradients: dict[str, Gradient]  # axis over which it is copied -> what its gradient is there
    reducers: dict[str, str]  # axis -> who reduces it
    source: str  # "declared", or what it was inferred from
    stages: tuple[int, ...] = ()  # pipeline ranks that hold a copy, if several do

    @property
    def is_expert(self) -> bool:
        """Reduced over the experts' data ranks, not over all."""
        return "expert" in self.shard


def declare(
    parameter: torch.nn.Parameter,
    *,
    shard: str | Sequence[str] = (),
    tensor: Declared | None = None,
    expert_tensor: Declared | None = None,
    pipeline: Literal["partial"] | None = None,
) -> torch.nn.Parameter:
    """Say how a parameter lies; return it.

    shard: axes over which it is cut: "tensor", or for a parameter of an expert "expert" (alone, or with "expert_tensor").
    tensor, expert_tensor: its gradient on the ranks of that group if it is copied there: full, partial (sum), duplicated
    (mean), or sequence: partial under sequence parallelism, else full. pipeline="partial": several stages hold a copy.
    Raises ValueError for an axis both cut and copied, and for an unknown one.

        declare(self.value_head.weight, tensor="sequence")                   # replicated head on the hidden states
        declare(lora_a, tensor="sequence"); declare(lora_b, shard="tensor")  # of a column-parallel layer (lora.py)
        declare(expert_lora_a, shard="expert", expert_tensor="partial")
    """
    cut = (shard,) if isinstance(shard, str) else tuple(shard)
    said: dict[str, Any] = {"tensor": tensor, "expert_tensor": expert_tensor, "pipeline": pipeline}
    gradients: dict[str, Declared] = {axis: value for axis, value in said.items() if value is not None}
    for axis in cut:
        if axis not in ("tensor", "expert", "expert_tensor"):
            raise ValueError(f"shard={axis!r}: a parameter is cut over tensor, expert or expert_tensor")
        if axis in gradients:
            raise ValueError(f"{axis} both cut (shard) and copied ({axis}={gradients[axis]!r}); keep one")
    for axis, value in gradients.items():
        if value not in ("full", "partial", "duplicated", "sequence"):
            raise ValueError(f"{axis}={value!r}: the gradient of a copy is full, partial, duplicated or sequence")
    if "expert_tensor" in (*cut, *gradients) and "expert" not in cut:
        raise ValueError('expert_tensor is an axis of experts; say shard="expert" as well')
    if "tensor" in (*cut, *gradients) and "expert" in cut:
        raise ValueError("experts have expert_tensor in the place of tensor")
    parameter.placement = Declaration(cut, gradients)  # pyright: ignore[reportAttributeAccessIssue]
    return parameter


def place(chunks: Sequence[Any], named: Sequence[tuple[str, torch.nn.Parameter]], grid: Grid, *, hooks: bool = False) -> list[Placement]:
    """Settle every parameter of this rank's chunks, and set megatron's attributes to match (collective).

    named: (global name, parameter), names alike on every rank that holds a copy. hooks: reduce over tensor ranks in the
    backward pass what megatron's finalisation would reduce after it.
    Call it before DDP and the optimizer are made, and after freezing. Raises PlacementError with every open question.
    """
    config = chunks[0].config
    owners = {id(p): module for chunk in chunks for module in chunk.modules() for p in module.parameters(recurse=False)}
    copies = _stages_of(named, grid)
    placements, problems = [], []
    for name, parameter in named:
        try:
            found = _settle(name, parameter, owners[id(parameter)], config, grid, copies.get(name, ()))
            placements.append(_with_reducers(found, config, hooks))
        except PlacementError as problem:
            problems.append(str(problem))
    everywhere: list[Any] = [None] * grid.world
    mine = {p.name: (p.shard, p.gradients, p.reducers) for p in placements if not problems}
    dist.all_gather_object(everywhere, (problems, mine))
    lines = dict.fromkeys(line for found, _ in everywhere for line in found)
    lines.update(dict.fromkeys(_disagreements([said for _, said in everywhere])))
    if lines:
        raise PlacementError("\n".join(lines))
    seen: set[str] = set()
    for placement in placements:
        _tell_megatron(placement, grid, first=placement.name not in seen)
        seen.add(placement.name)
    return placements


def _settle(name: str, parameter: Any, owner: Any, config: Any, grid: Grid, stages: tuple[int, ...]) -> Placement:
    declared: Declaration | None = getattr(parameter, "placement", None)
    tied = getattr(parameter, "shared_embedding", False) and name.endswith(("word_embeddings.weight", "output_layer.weight"))
    if declared is not None:
        shard, said, source = declared.shard, dict(declared.gradients), "declared"
    else:
        shard, said, source = _infer(name, parameter, owner, config, grid)
        # With multi-token prediction the last stage embeds as well; megatron adds up the word table's gradients only.
        if stages and not tied and source != "position embedding":
            raise PlacementError(
                f"{name}: pipeline stages {', '.join(map(str, stages))} each hold a copy, and nothing adds up their gradients; "
                'say declare(parameter, pipeline="partial"), or keep it on one stage'
            )
    expert = "expert" in shard
    inner = "expert_tensor" if expert else "tensor"
    size = (grid.expert_tensor if expert else grid.tensor).size
    gradients: dict[str, Gradient] = {"expert_data" if expert else "data_context": "partial"}
    if size > 1 and inner not in shard:
        if inner not in said:
            raise PlacementError(f"{name}: declared, but not for the {inner} group of {size} ranks; say {inner}=\"full\", \"partial\" or \"duplicated\", or shard=\"{inner}\"")
        value = said[inner]
        gradients[inner] = ("partial" if config.sequence_parallel else "full") if value == "sequence" else value
    if stages or (tied and grid.pipeline.size > 1):
        gradients["pipeline"] = "partial"
    return Placement(name, parameter, shard, gradients, {}, source, () if tied else stages)


def _infer(name: str, parameter: Any, owner: Any, config: Any, grid: Grid) -> tuple[tuple[str, ...], dict[str, Declared], str]:
    """(axes cut, gradients of copies, from what) of an undeclared parameter. Raises PlacementError where there is a doubt."""
    cut = bool(getattr(parameter, "tensor_model_parallel", False))
    tokens_cut = bool(getattr(parameter, "sequence_parallel", False))
    if re.search(r"(^|\.)experts\.", name):
        if getattr(parameter, "allreduce", True):
            raise PlacementError(
                f"{name}: a parameter of an expert without `allreduce = False` would be averaged over different experts; "
                'say declare(parameter, shard="expert", expert_tensor="full" or "partial") or shard=("expert", "expert_tensor")'
            )
        if cut or grid.expert_tensor.size == 1:
            return ("expert", "expert_tensor"), {}, "an expert's weight"
        raise PlacementError(
            f"{name}: copied on the {grid.expert_tensor.size} ranks of the expert_tensor group; "
            'say declare(parameter, shard="expert", expert_tensor="full" or "partial")'
        )
    if not getattr(parameter, "allreduce", True):
        raise PlacementError(
            f"{name}: `allreduce = False` belongs to experts; it would be reduced over expert_data ranks only. "
            'Remove it, or say declare(parameter, shard="expert")'
        )
    kind = type(owner).__name__
    norm = kind in ("RMSNorm", "LayerNorm")
    if norm and re.search(r"\b[qk]_layernorm\b", name) and not config.multi_latent_attention:
        # One norm for all heads, of which each tensor rank has some. Megatron knows it by its name.
        return (), {"tensor": "partial"}, "per-head norm"
    if norm and grid.tensor.size > 1 and parameter.shape[-1] not in _widths(config):
        raise PlacementError(
            f"{name}: a {kind} of {parameter.shape[-1]} values, while hidden states have {config.hidden_size}: is it one for all heads, of which each tensor rank has some? "
            'Then say declare(parameter, tensor="partial"), for a layer on hidden states tensor="sequence"'
        )
    if name.endswith("embedding.position_embeddings.weight"):
        # Added before the sequence is cut (language_model_embedding.py:106): the backward of the cut gathers the gradient.
        if tokens_cut:
            raise PlacementError(f"{name}: its gradient is full on every tensor rank; `sequence_parallel = True` would count it {grid.tensor.size} times. Remove it")
        return (), {"tensor": "full"}, "position embedding"
    if hasattr(parameter, "sequence_parallel") and not (cut and kind not in _FOLLOWS_TOKENS):
        # Set, true or false, by norms, routers, replicated linears and biases: layers on this rank's tokens.
        if cut or tokens_cut != bool(config.sequence_parallel):
            raise PlacementError(
                f"{name}: a {kind} sees this rank's tokens, so under sequence_parallel={bool(config.sequence_parallel)} its parameters have "
                f"sequence_parallel={bool(config.sequence_parallel)} and tensor_model_parallel=False; found {tokens_cut} and {cut}. "
                'Where it sees other tokens, say declare(parameter, tensor="full" or "partial")'
            )
        return (), {"tensor": "sequence"}, f"{kind} on this rank's tokens"
    if cut and is_cut_layer(kind):
        return ("tensor",), {}, kind
    if getattr(parameter, "average_gradients_across_tp_domain", False):
        return (), {"tensor": "duplicated"}, "average_gradients_across_tp_domain"
    if grid.tensor.size == 1:
        return (), {}, "no tensor parallelism"
    raise PlacementError(
        f"{name} ({kind}): nothing says whether its gradient on the {grid.tensor.size} tensor ranks is full or partial; "
        'say declare(parameter, tensor="sequence") for a layer on the hidden states, else "full", "partial", "duplicated" or shard="tensor"'
    )


def _widths(config: Any) -> set[int]:
    """Of hidden states, and of latent attention's."""
    return {config.hidden_size, getattr(config, "q_lora_rank", None), getattr(config, "kv_lora_rank", None)} - {None}  # pyright: ignore[reportReturnType]


_CUT = re.compile("(Lora)?(TE)?((LayerNorm)?(Column|Row)Parallel(Grouped)?Linear|VocabParallelEmbedding)")
# Modules that are never cut over tensor ranks.
_FOLLOWS_TOKENS = ("RMSNorm", "LayerNorm", "TopKRouter", "Linear")


def is_cut_layer(kind: str) -> bool:
    """Whether modules of a class of this name always cut their weights over tensor ranks."""
    return _CUT.fullmatch(kind) is not None


def _with_reducers(p: Placement, config: Any, hooks: bool) -> Placement:
    """One reducer an axis; refuses a parameter that megatron would reduce as well."""
    reducers = {}
    sums = bool(config.sequence_parallel and getattr(p.parameter, "sequence_parallel", False))
    by_name = bool(config.qk_layernorm and ("q_layernorm" in p.name or "k_layernorm" in p.name))  # finalize_model_grads.py:288
    for axis, gradient in p.gradients.items():
        if not p.parameter.requires_grad or gradient == "full":
            reducers[axis] = NOBODY
        elif axis in ("data_context", "expert_data"):
            reducers[axis] = DDP
        elif axis == "pipeline":
            reducers[axis] = FINAL_HOOK if p.stages else EMBEDDING
        elif axis == "tensor" and gradient == "partial" and by_name:
            reducers[axis] = TENSOR_SUM
        elif axis == "tensor" and gradient == "partial" and sums and not hooks and p.source != "declared":
            reducers[axis] = TENSOR_SUM
        elif axis == "tensor" and getattr(p.parameter, "average_gradients_across_tp_domain", False) and gradient == "duplicated":
            reducers[axis] = TENSOR_MEAN
        else:
            reducers[axis] = HOOK
    if by_name and p.parameter.requires_grad and reducers.get("tensor") in (NOBODY, HOOK):
        raise PlacementError(
            f"{p.name}: declared or found {p.gradients['tensor']} over tensor ranks, but megatron sums every parameter with q_layernorm or k_layernorm in its name; rename it"
        )
    return replace(p, reducers=reducers)


def _tell_megatron(p: Placement, grid: Grid, *, first: bool) -> None:
    """Attributes by which megatron's DDP, finalisation, optimizer and gradient norm treat the parameter as it is placed."""
    parameter: Any = p.parameter
    if p.reducers.get("tensor") in (HOOK, NOBODY):
        parameter.sequence_parallel = False
        parameter.average_gradients_across_tp_domain = False
        if p.source != "declared" and "tensor" in p.gradients:
            parameter.placement = Declaration((), {"tensor": p.gradients["tensor"]})  # what is written over here was read above
    if p.is_expert:
        parameter.allreduce = False
        # The norm leaves out what is not cut on all tensor ranks but the first (optimizer.py:147). An expert copied over
        # expert_tensor ranks counts on the first of THOSE.
        if "expert_tensor" not in p.shard:
            parameter.tensor_model_parallel = True
            parameter.shared = getattr(parameter, "shared", False) or grid.expert_tensor.rank > 0
    if "tensor" in p.shard or "expert_tensor" in p.shard:
        parameter.tensor_model_parallel = True
    if p.stages:
        if grid.pipeline.rank != p.stages[0] or not first:
            parameter.shared = True  # the norm counts one copy
        # A bucket of its own: the distributed optimizer then cuts it alike on every stage (param_and_grad_buffer.py:697).
        parameter.shared_embedding = True


def _stages_of(named: Sequence[tuple[str, Any]], grid: Grid) -> dict[str, tuple[int, ...]]:
    """Name -> pipeline ranks that hold it, for names held more than once (by virtual stages of one rank, too)."""
    if grid.pipeline.size == 1:
        return {}
    names: list[Any] = [None] * grid.pipeline.size
    dist.all_gather_object(names, [name for name, _ in named], group=grid.pipeline.group)
    holders: dict[str, list[int]] = {}
    for stage, held in enumerate(names):
        for name in held:
            holders.setdefault(name, []).append(stage)
    return {name: tuple(dict.fromkeys(stages)) for name, stages in holders.items() if len(stages) > 1}


def _disagreements(said: list[dict[str, Any]]) -> Iterator[str]:
    """Parameters that two ranks place differently: their collectives would not meet."""
    first: dict[str, tuple[int, Any]] = {}
    for rank, placements in enumerate(said):
        for name, placement in placements.items():
            other, expected = first.setdefault(name, (rank, placement))
            if placement != expected:
                yield f"{name}: placed as {expected} on rank {other}, as {placement} on rank {rank}; declare and freeze it alike everywhere"


def table(placements: Sequence[Placement], stages: Any = None) -> str:
    """One line a kind of parameter: how many, cut, copied with which gradient, reducer, why.

    stages: a group of pipeline ranks, to be told of the parameters of all of them (collective); else this rank's.
    """
    rows = []
    for p in placements:
        copied = ", ".join(f"{axis}: {gradient} ({p.reducers[axis]})" for axis, gradient in p.gradients.items())
        rows.append((re.sub(r"\.\d+\.", ".*.", p.name), "+".join(p.shard) or "-", copied, p.source))
    everywhere: list[Any] = [rows]
    if stages is not None:
        everywhere = [None] * stages.size()
        dist.all_gather_object(everywhere, rows, group=stages)
    kinds: dict[tuple[str, ...], int] = {}
    for row in (row for found in everywhere for row in found):
        kinds[row] = kinds.get(row, 0) + 1
    rows = [("parameter", "n", "cut over", "gradient of its copies (reducer)", "from"), *((k[0], str(n), *k[1:]) for k, n in kinds.items())]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def summary(placements: Sequence[Placement]) -> str:
    """One line for the start of a run: parameters by reducer."""
    counts: dict[str, int] = {}
    for p in placements:
        for axis, reducer in p.reducers.items():
            if reducer not in (NOBODY, DDP):
                counts[f"{reducer} over {axis}"] = counts.get(f"{reducer} over {axis}", 0) + 1
    rest = "; ".join(f"{n} by {reducer}" for reducer, n in counts.items()) or "nothing beyond DDP"
    return f"{len(placements)} parameters placed on this rank: {rest}"

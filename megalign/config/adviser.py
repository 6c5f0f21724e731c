"""Given devices, a model and a sequence length: the layouts that pass the validator and fit, fastest first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megalign.config.hardware import Device
from megalign.config.layout import Layout, layout_of, padded_vocab
from megalign.config.memory import Algorithm, memory_per_rank
from megalign.config.predict import StepTime, step_time
from megalign.config.rules import RULES
from megalign.config.schema import Recipe

LONG = 8192  # tokens from which rows are cut by context parallelism
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "layernorm"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


@dataclass(frozen=True)
class Candidate:
    """A layout that the validator lets pass. `memory`: bytes of its fullest rank."""

    recipe: Recipe
    layout: Layout
    memory: int
    time: StepTime

    @property
    def tokens_per_second(self) -> float:
        return self.recipe.train.global_batch_size * self.recipe.data.sequence_length / self.time.total

    def overrides(self) -> list[str]:
        """What to write behind `megalign sft RECIPE`."""
        parallel = self.recipe.parallel.model_dump(exclude_defaults=True, exclude={"data_parallel_size"})
        train = self.recipe.train.model_dump(include={"micro_batch_size", *(key for way in RECOMPUTE.values() for key in way)}, exclude_defaults=True)
        return [f"{section}.{key}={_yaml(value)}" for section, keys in (("parallel", parallel), ("train", train)) for key, value in keys.items()]


@dataclass(frozen=True)
class Advice:
    """candidates: fit, fastest first. smallest: of those that do not fit, the one nearest to fitting."""

    candidates: list[Candidate]
    tried: int
    refused: int
    too_large: int
    smallest: Candidate | None


def advise(recipe: Recipe, vocab_size: int, gpus: int, device: Device, *, algorithm: Algorithm = "sft", reward_model: bool = False) -> Advice:
    """Every layout of `gpus` devices over the axes below, checked, weighed and timed.

    Tried: tensor parallelism within a node (with sequence parallelism), pipelines with even and uneven last stages and
    two or four virtual stages, context parallelism from 8192 tokens, expert parallelism, micro-batches of 1, 2 and 4,
    recomputation none, selective (core_attn, layernorm) and full.
    """
    fitting, large, tried, refused = [], [], 0, 0
    for parallel, train in _choices(recipe, gpus, device):
        given = recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update=parallel), "train": recipe.train.model_copy(update=train)})
        tried += 1
        layout = layout_of(given, gpus)
        if any(True for rule in RULES for _ in rule(given, layout)):
            refused += 1
            continue
        stages = memory_per_rank(given, vocab_size, gpus, algorithm=algorithm, reward_model=reward_model, device=device.kind)
        memory = max(stage["total"] for stage in stages)
        fits = memory <= device.memory * device.usable
        if not fits and large and memory >= large[0].memory:
            large.append(large[0])
            continue
        time = step_time(given, layout, padded_vocab(vocab_size, layout.tp), device, algorithm=algorithm)
        (fitting if fits else large).insert(0, Candidate(given, layout, memory, time))
    fitting.sort(key=lambda candidate: (candidate.time.total, candidate.memory))
    return Advice(fitting, tried, refused, len(large), large[0] if large else None)


def _choices(recipe: Recipe, gpus: int, device: Device) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    model, batch = recipe.model, recipe.train.global_batch_size
    experts = model.num_moe_experts
    tensor = [size for size in (1, 2, 4, 8) if size <= min(device.node_size, gpus)]
    context = [size for size in (1, 2, 4, 8, 16) if size == 1 or recipe.data.sequence_length / size >= LONG / 2]
    pipeline = [size for size in range(1, min(gpus, model.num_layers) + 1) if gpus % size == 0]
    expert = [1] if experts is None else [size for size in range(1, experts + 1) if experts % size == 0 and gpus % size == 0]
    for tp, pp, cp, ep in itertools.product(tensor, pipeline, context, expert):
        ranks = tp * pp * cp
        if gpus % ranks or batch % (gpus // ranks) or (gpus // pp) % ep:
            continue
        for stages, (micro, way) in itertools.product(_stages(model.num_layers, pp), itertools.product((1, 2, 4), RECOMPUTE)):
            if batch % (micro * gpus // ranks):
                continue
            parallel = {
                "tensor_model_parallel_size": tp,
                "pipeline_model_parallel_size": pp,
                "context_parallel_size": cp,
                "expert_model_parallel_size": ep,
                "expert_tensor_parallel_size": None,
                "sequence_parallel": tp > 1,
                "data_parallel_size": None,
                "use_distributed_optimizer": True,
                **stages,
            }
            reset = dict.fromkeys(("recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules"))
            yield parallel, {"micro_batch_size": micro, **reset, **RECOMPUTE[way]}


def _stages(layers: int, pp: int) -> Iterator[dict[str, Any]]:
    """Ways to cut `layers` over pp stages: evenly, interleaved, or with a shorter last stage."""
    plain = {
        "virtual_pipeline_model_parallel_size": None,
        "num_layers_in_first_pipeline_stage": None,
        "num_layers_in_last_pipeline_stage": None,
        "pipeline_model_parallel_layout": None,
    }
    if layers % pp == 0:
        yield plain
        yield from ({**plain, "virtual_pipeline_model_parallel_size": vpp} for vpp in (2, 4) if pp > 1 and layers % (pp * vpp) == 0)
        return
    others = -(-layers // pp)
    last = layers - others * (pp - 1)
    if last >= 1:
        yield {**plain, "num_layers_in_last_pipeline_stage": last}


def _yaml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(value)}]"
    return {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else str(value)

"""Bytes of live tensors of one rank in a real training step, part by part."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch

from megalign.batch import Batch, collate
from megalign.config.schema import Recipe
from megalign.data.rows import Example


class Live:
    """Bytes of distinct storages that are held at one time, and their peak."""

    def __init__(self, ignored: set[int]):
        self.ignored, self.holders, self.peak = ignored, {}, 0

    def add(self, tensor: torch.Tensor, owner: Any) -> None:
        """`tensor` lives until `owner` dies."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.ignored:
            return
        _, count = self.holders.get(key, (storage, 0))
        self.holders[key] = (storage, count + 1)
        weakref.finalize(owner, self._drop, key)
        self.peak = max(self.peak, sum(held.nbytes() for held, _ in self.holders.values()))

    def _drop(self, key: int) -> None:
        storage, count = self.holders.pop(key)
        if count > 1:
            self.holders[key] = (storage, count - 1)


class _Saved:
    """What autograd keeps in the place of a tensor."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


def rows(recipe: Recipe, count: int, vocabulary: int, documents: int = 2) -> list[Batch]:
    """Full rows of equal documents, every token scored but the first of a document."""
    numbers = np.random.default_rng(0)
    length = recipe.data.sequence_length
    multiple = 2 * recipe.parallel.context_parallel_size if recipe.parallel.context_parallel_size > 1 else 1
    found = []

    def document() -> Example:
        return Example(numbers.integers(0, vocabulary, length // documents).astype(np.int32), np.arange(length // documents) > 0)

    for _ in range(count):
        packs = [[document() for _ in range(documents)] for _ in range(recipe.train.micro_batch_size)]
        found.append(collate(packs, sequence_length=length, pad_id=0, document_multiple=multiple))
    return found


def measure(cases: list[tuple[dict[str, Any], int]], documents: int = 2) -> list[dict[str, int]]:
    """One step of each (recipe, vocabulary) on this world: bytes by part on this rank."""
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

    found = []
    for given, vocabulary in cases:
        get_moe_layer_wise_logging_tracker().clear()
        found.append(_measure(Recipe.model_validate(given), vocabulary, documents))
    return found


def _measure(recipe: Recipe, vocabulary: int, documents: int) -> dict[str, int]:
    import torch.distributed as dist

    from megalign.config.layout import layout_of
    from megalign.config.rules import check
    from megalign.kernels import logprob
    from megalign.parallel.grid import destroy_grid
    from megalign.parallel.init import in_distributed_launch
    from megalign.sft import token_loss
    from megalign.trainer.engine import Engine
    from megalign.trainer.objective import Objective
    from megalign.trainer.run import grid_of

    assert in_distributed_launch()
    check(recipe, dist.get_world_size())
    grid: Any = grid_of(recipe, None)  # pyright: ignore[reportArgumentType]
    engine = Engine(recipe, grid, vocabulary)
    layout = layout_of(recipe, dist.get_world_size())
    buffers = [buffer for chunk in engine.chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    states = {p.untyped_storage()._cdata for chunk in engine.chunks for p in chunk.parameters()}
    live = Live(states | {b.grad_data.untyped_storage()._cdata for b in buffers})

    local_logits = logprob._Logits.__call__

    def logits(self: Any, rows: slice) -> torch.Tensor:
        result = local_logits(self, rows)
        live.add(result, result)  # kept outside autograd's own bookkeeping
        return result

    def pack(tensor: torch.Tensor) -> _Saved:
        saved = _Saved(tensor)
        live.add(tensor, saved)
        return saved

    logprob._Logits.__call__ = logits
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            engine.train_step(rows(recipe, layout.microbatches, vocabulary, documents), Objective(token_loss), 1e-4, 1)
    finally:
        logprob._Logits.__call__ = local_logits
    destroy_grid()
    inner = [part.optimizer for part in getattr(engine.optimizer, "chained_optimizers", [engine.optimizer])]
    owned = [parameter for optimizer in inner for group in optimizer.param_groups for parameter in group["params"]]
    weights = _bytes(p for chunk in engine.chunks for p in chunk.parameters())
    moments = [state[name] for optimizer in inner for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return {
        "stage": grid.pipeline.rank,
        "weights": weights,
        "gradients": _bytes(p.main_grad for chunk in engine.chunks for p in chunk.parameters()),
        "masters": _bytes(owned) if recipe.train.precision == "bf16" else 0,
        "moments": _bytes(moments),
        "activations": live.peak,
    }


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def beside_the_policy(cases: list[tuple[dict[str, Any], int]]) -> list[dict[str, int]]:
    """Of each (recipe, vocabulary) on this rank: bytes of the moving average, of a reference, and of the cache of rollouts."""
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

    from megalign.config.layout import layout_of
    from megalign.parallel.grid import destroy_grid
    from megalign.rollout.decoder import Decoder
    from megalign.rollout.switch import generating
    from megalign.trainer.engine import Engine
    from megalign.trainer.reference import ReferenceModel
    from megalign.trainer.run import grid_of

    found = []
    for given, vocabulary in cases:
        get_moe_layer_wise_logging_tracker().clear()
        recipe = Recipe.model_validate(given)
        grid: Any = grid_of(recipe, None)  # pyright: ignore[reportArgumentType]
        engine, reference = Engine(recipe, grid, vocabulary), ReferenceModel(recipe, grid, vocabulary)
        sequences = recipe.train.global_batch_size // layout_of(recipe, grid.world).dp
        with generating(engine.models):
            decoder = Decoder(engine.models, grid, torch.zeros(sequences, dtype=torch.long), recipe.data.sequence_length)
            decoder.step(torch.zeros(sequences, 3, dtype=torch.long))
        assert engine.shadow is not None
        found.append({
            "stage": grid.pipeline.rank,
            "average": _bytes(engine.shadow.values),
            "reference": _bytes(p for model in reference.engine.models for p in model.parameters()),
            "kv_cache": _bytes(tensor for pair in decoder.context.key_value_memory_dict.values() for tensor in pair),
        })  # fmt: skip
        destroy_grid()
    return found

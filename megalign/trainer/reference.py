"""The frozen reference of preference optimisation: a cached pass over the data, a second model in memory, or the base of adapters.

The first two start from the files that the policy started from (or from reference_from), loaded on their own, never from the
policy or its checkpoints: a resumed run keeps the reference it had. What they were made from is remembered as hashes of
model, tokenizer, template and data; a difference is an error.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megalign.batch import Batch
from megalign.config.schema import LoraConfig, Recipe, ReferenceConfig
from megalign.data.dataset import Dataset
from megalign.models.resolve import own_checkpoint
from megalign.models.sequences import sequence_logprobs, sequence_tokens
from megalign.parallel.grid import Grid
from megalign.parallel.init import device
from megalign.parallel.lora import adapters_off
from megalign.parallel.schedule import from_last_stage, sum_over
from megalign.trainer.batches import Batches
from megalign.trainer.engine import Engine
from megalign.trainer.guard import TrainingStopped
from megalign.trainer.run import RunError

REF_LOGPROB = "ref_logprob"
# Of policy and reference at step 0, a nat and a token: rounding of logits, in FP32 and in BF16.
TOLERANCE = {"fp32": 1e-6, "bf16": 2e-2}


def reference_recipe(recipe: Recipe, settings: ReferenceConfig) -> Recipe:
    """The recipe with the reference's weights as its start, and no adapters."""
    changed = recipe.model_copy(deep=True)
    if settings.reference_from is not None:
        changed.model.init_from = str(own_checkpoint(Path(settings.reference_from)) or settings.reference_from)
    changed.lora = LoraConfig()
    return changed


def cache_reference(recipe: Recipe, grid: Grid, vocab_size: int, folder: Path, made_from: Mapping[str, str], sets: Mapping[str, Dataset]) -> str:
    """Give every example of `sets` its log-prob under the reference, from `folder` or by one pass (collective).

    recipe: the reference's. A set's rows have `columns`, [rows, documents a row] each (`PairRows`, `AnswerRows`).
    Returns what was done, in a sentence. Raises RunError where `folder` was made from another model, template or data.
    """
    key = {**made_from, **{f"{name} rows": dataset.statistics["fingerprint"] for name, dataset in sets.items()}}
    saved = folder / "made_from.json"
    dist.barrier()  # nobody looks before everybody is here: rank 0 may write soon
    found = json.loads(saved.read_text()) if saved.exists() else None
    if found is not None and found != key:
        changed = [name for name in key if found.get(name) != key[name]] + [name for name in found if name not in key]
        fix = "remove the folder to compute them again, restore what changed, or give another reference_cache"
        raise RunError(f"stale reference log-probs: {folder} was made from another {', '.join(changed)}; {fix}")
    if found is None:
        engine = Engine(recipe, grid, vocab_size, train=False)
        values = {name: _one_pass(engine, dataset) for name, dataset in sets.items()}
        del engine
        gc.collect()
        if grid.is_logger:
            _write(folder, key, values)
        dist.barrier()
    for name, dataset in sets.items():
        columns_of(dataset)[REF_LOGPROB] = np.load(folder / f"{name}.npy").astype(np.float64)
    rows = sum(len(dataset) for dataset in sets.values())
    return f"reference log-probs of {rows} rows {'computed, kept in' if found is None else 'read from'} {folder}"


def columns_of(dataset: Dataset) -> dict[str, np.ndarray]:
    """[rows, documents a row] of each value that the examples of a set carry; what is put there, they carry too."""
    rows: Any = dataset.rows
    return rows.columns


def _one_pass(engine: Engine, dataset: Dataset) -> np.ndarray:
    """[rows, documents a row] FP32 log-probs of a set's documents under the engine's model, equal on every rank."""
    grid, recipe = engine.grid, engine.recipe
    rows, documents = columns_of(dataset)["row"].shape
    found = torch.zeros(rows, documents, dtype=torch.float64, device=device())
    for microbatches in Batches(dataset, recipe, grid, evaluation=True).one_pass() if len(dataset) else ():
        for batch, logprobs in zip(microbatches, engine.score(microbatches, lambda output, batch: sequence_logprobs(output, batch, grid))):
            numbers = batch.values["row"][::documents].long() if batch.values else torch.zeros(0, dtype=torch.long)
            found[numbers] = logprobs.double().view(-1, documents)
    return from_last_stage(sum_over(found, grid.data.group), grid).cpu().numpy().astype(np.float32)


def _write(folder: Path, key: Mapping[str, str], values: Mapping[str, np.ndarray]) -> None:
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, array in values.items():
        np.save(partial / f"{name}.npy", array)
    (partial / "made_from.json").write_text(json.dumps(key, indent=1))
    partial.rename(folder)


class ReferenceModel:
    """The reference (recipe: its own) as a second model in memory: scores each step's microbatches before the policy sees them."""

    def __init__(self, recipe: Recipe, grid: Grid, vocab_size: int):
        self.engine = Engine(recipe, grid, vocab_size, train=False)
        for model in self.engine.models:
            model.requires_grad_(False)

    def prepare(self, microbatches: Sequence[Batch]) -> None:
        """Put the reference's log-probs into the batches."""
        _score_into(microbatches, self.engine)


class BaseReference:
    """The reference as the policy's own base, its adapters off: no second model, and it cannot change, for the base is frozen."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def prepare(self, microbatches: Sequence[Batch]) -> None:
        """Put the reference's log-probs into the batches."""
        with adapters_off(self.engine.models):
            _score_into(microbatches, self.engine)


def _score_into(microbatches: Sequence[Batch], engine: Engine) -> None:
    """Known on the last stage alone, where the loss is."""
    for batch, logprobs in zip(microbatches, engine.score(microbatches, lambda output, batch: sequence_logprobs(output, batch, engine.grid))):
        if batch.values:  # else it is all padding
            batch.values[REF_LOGPROB] = logprobs.double()


def check_step_zero(engine: Engine, dataset: Dataset, prepare: Callable[[Sequence[Batch]], None] | None) -> str:
    """Policy and reference give the first step's answers equal log-probs before any update (collective).

    Raises TrainingStopped, on every rank, with the first pair that differs. Returns the largest difference in words.
    """
    grid = engine.grid
    microbatches, _ = Batches(dataset, engine.recipe, grid).next_step()
    if prepare is not None:
        prepare(microbatches)
    policy = engine.score(microbatches, lambda output, batch: sequence_logprobs(output, batch, grid))
    paired = columns_of(dataset)["row"].shape[-1] == 2
    worst, line = 0.0, ""
    tolerance = TOLERANCE[engine.recipe.train.precision]
    for batch, logprobs in zip(microbatches, policy):
        if not len(logprobs):
            continue
        reference = batch.values[REF_LOGPROB].to(logprobs.device)
        allowed = tolerance * (reference.abs() + sequence_tokens(batch).to(logprobs.device))
        excess, where = ((logprobs.double() - reference).abs() / allowed).max(0)
        if not excess <= worst:  # NaN is an excess too
            worst = float(excess.nan_to_num(nan=torch.inf))
            row = int(batch.values["row"][where])
            which = f"pair {row}, {('chosen', 'rejected')[int(where) % 2]}" if paired else f"row {row}"
            line = f"{which}: {float(logprobs[where]):.6f} under the policy, {float(reference[where]):.6f} under the reference"
    most = torch.tensor([worst], dtype=torch.float64, device=device())
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    if most.item() > 1:
        lines: list[Any] = [None] * grid.world
        dist.all_gather_object(lines, (worst, line))
        _, told = max(lines)
        fix = (
            "the reference must be the model the policy starts from: restore the files of model.init_from, or name another "
            f"reference on purpose with {'dpo' if paired else 'kto'}.reference_from"
        )
        raise TrainingStopped(f"policy and reference log-probs differ before the first update ({told}); layout {grid.layout()}", 0, fix=fix)
    return f"policy = reference at step 0: differences reach {most.item():.2g} of the {tolerance:g} a nat and a token that rounding is allowed"



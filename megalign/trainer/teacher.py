"""The teacher of a distillation: a second model in memory, or its most probable tokens, kept in a folder.

A teacher in memory stands on the student's grid; one that is kept runs first, alone, on a layout of its own. What was kept
is remembered with hashes of the teacher's weights, tokenizer, template and data; a difference is an error.

# N scored tokens of a microbatch (this rank's, under context parallelism), E the teacher's hidden size, K tokens kept
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megalign.batch import Batch
from megalign.config.errors import ConfigError, Problem
from megalign.config.schema import LoraConfig, ModelConfig, Recipe, TokenizerConfig
from megalign.data.dataset import Dataset, build_datasets
from megalign.data.rows import DataError, Example
from megalign.data.tokenizer import load_tokenizer
from megalign.models.divergence import top_k_of
from megalign.models.resolve import resolve_model
from megalign.parallel.context import context_part
from megalign.parallel.grid import Grid, destroy_grid
from megalign.parallel.init import World
from megalign.trainer.batches import Batches
from megalign.trainer.engine import Engine
from megalign.trainer.run import RunError, grid_of


def teacher_recipe(recipe: Recipe) -> Recipe:
    """The teacher's own recipe: its weights and shape, its layout, the run's data.

    Raises ConfigError where there is no teacher, or its folder is none.
    """
    settings = recipe.distill
    if settings.teacher is None:
        raise ConfigError([Problem("distill.teacher", "there is nobody to learn from", "give a Hugging Face folder, or a run of ours", None)])
    changed = recipe.model_copy(deep=True)
    changed.model = ModelConfig(init_from=settings.teacher, transformer_impl=recipe.model.transformer_impl)
    changed.parallel = settings.teacher_parallel or recipe.parallel
    changed.lora = LoraConfig()
    changed.data.tokenizer = TokenizerConfig()  # its own, whatever the student has
    try:
        return resolve_model(changed)
    except ConfigError as error:
        raise ConfigError([replace(problem, field=problem.field.replace("model.init_from", "distill.teacher")) for problem in error.problems]) from None


def with_tokenizer_of(recipe: Recipe, teacher: Recipe) -> Recipe:
    """The student's recipe; a student that starts from nothing takes the teacher's tokenizer and template.

    Raises ConfigError where the two have different tokenizers: a distribution over other tokens teaches nothing.
    """
    path = teacher.data.tokenizer.path or teacher.model.init_from
    own = recipe.data.tokenizer.path or resolve_model(recipe).data.tokenizer.path or recipe.model.init_from
    if own is None:
        recipe = recipe.model_copy(deep=True)
        recipe.data.tokenizer.path, recipe.data.template = path, teacher.data.template
        return recipe
    if load_tokenizer(own).hash != load_tokenizer(str(path)).hash:
        rule = f"its tokenizer is not that of {own}: probabilities of other tokens teach nothing"
        raise ConfigError([Problem("distill.teacher", rule, "give a teacher with the same tokenizer, or set distill.mode to sequence", recipe.distill.teacher)])
    return recipe


def check_vocabulary_of(teacher: Recipe, vocab_size: int) -> None:
    """Raise ConfigError unless both tables have as many rows: shards of unequal tables do not lie under each other."""
    if teacher.model.vocab_size not in (None, vocab_size):
        rule = f"its table has {teacher.model.vocab_size} rows, the student's {vocab_size}"
        raise ConfigError([Problem("distill.teacher", rule, "give a teacher with a table of that size, or set distill.mode to sequence", teacher.model.init_from)])


def numbered_datasets(recipe: Recipe) -> tuple[Dataset, Dataset]:
    """`build_datasets`, whose documents carry the number of their row and which set it is of. Raises DataError of streamed data too."""
    if recipe.data.streaming:
        raise DataError("data.streaming is true, and distill numbers all rows before training: set it to false")
    train, validation = build_datasets(recipe)
    return replace(train, rows=_Numbered(train.rows, 0.0)), replace(validation, rows=_Numbered(validation.rows, 1.0))


class _Numbered(Sequence[list[Example]]):
    def __init__(self, rows: Sequence[list[Example]], held_out: float):
        self.rows, self.held_out = rows, held_out

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        values = {"row": float(range(len(self))[index]), "held_out": self.held_out}
        return [replace(example, values=values) for example in self.rows[index]]


class TeacherModel:
    """The teacher in memory: keeps what its last layer says of each step's scored tokens, [N, E] a microbatch."""

    def __init__(self, recipe: Recipe, grid: Grid, vocab_size: int):
        self.engine = Engine(recipe, grid, vocab_size, train=False)
        for model in self.engine.models:
            model.requires_grad_(False)
        self._found: dict[int, tuple[Tensor, Tensor]] = {}

    def prepare(self, microbatches: Sequence[Batch]) -> None:
        """Run the teacher over a step's microbatches, before the student sees them (collective)."""
        weights: list[Tensor] = []

        def hidden(hidden_NE: Tensor, weight_vE: Tensor, targets_N: Tensor, batch: Batch) -> Tensor:
            weights.append(weight_vE)
            return hidden_NE

        found = self.engine.score(microbatches, lambda output, batch: output, head=hidden)
        self._found = {id(batch): (hidden_NE.detach(), weights[0].detach()) for batch, hidden_NE in zip(microbatches, found)}

    def says(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Hidden states [N, E] of a microbatch, and this rank's rows [v, E] of the teacher's output layer (last stage)."""
        return self._found[id(batch)]


class KeptTeacher:
    """The teacher's K most probable tokens at every scored token of both sets, mapped from a folder."""

    def __init__(self, folder: Path, sets: Sequence[Dataset], grid: Grid):
        self.grid = grid
        self.ends = [np.cumsum([0, *scored(dataset)]) for dataset in sets]
        self.ids, self.logprobs = ([np.load(folder / f"{name}_{what}.npy", mmap_mode="r") for name in ("train", "validation")] for what in ("ids", "logprobs"))

    def says(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Ids [N, K] and log-probs [N, K] of a microbatch."""
        where = positions(batch, self.ends, self.grid)
        held_out = int(batch.values["held_out"][0]) if batch.values else 0
        ids, logprobs = (torch.from_numpy(np.array(array[held_out][where])) for array in (self.ids, self.logprobs))
        return ids.long(), logprobs


def scored(dataset: Dataset) -> list[int]:
    """Scored tokens of each row of a set."""
    return [sum(int(np.count_nonzero(example.loss_mask)) for example in row) for row in dataset.rows]


def positions(batch: Batch, ends: Sequence[np.ndarray], grid: Grid) -> np.ndarray:
    """[N] where each scored token of a microbatch stands among all of its set, in the order of rows. ends: of each set, [rows + 1]."""
    if not batch.values:
        return np.zeros(0, np.int64)
    counts = torch.diff(torch.cat([torch.zeros(1, dtype=torch.long), batch.loss_mask.long().cumsum(0)])[batch.cu_seqlens.long()])[batch.documents]
    rows = batch.values["row"].long().numpy()
    starts = ends[int(batch.values["held_out"][0])][rows]
    before = np.cumsum(counts.numpy()) - counts.numpy()
    first = np.concatenate([[True], rows[1:] != rows[:-1]])  # of the documents of a row
    starts = starts + before - np.maximum.accumulate(np.where(first, before, 0))
    found = np.concatenate([np.arange(start, start + count) for start, count in zip(starts, counts.tolist())])
    whole = torch.zeros(len(batch.tokens), dtype=torch.long)
    whole[batch.loss_mask] = torch.from_numpy(found)
    return context_part(whole, batch.cu_seqlens, grid)[context_part(batch.loss_mask, batch.cu_seqlens, grid)].numpy()


def keep_teacher(teacher: Recipe, world: World, sets: Mapping[str, Dataset], folder: Path, made_from: Mapping[str, Any]) -> str:
    """Run the teacher over both sets on its own layout and keep its most probable tokens in `folder`, or find them there (collective).

    Returns what was done, in a sentence. Raises RunError where the folder was made from something else, ConfigError for more
    tokens than there are.
    """
    settings, tokens = teacher.distill, _vocabulary(teacher, sets["train"])
    if settings.teacher_top_k > tokens:
        raise ConfigError([Problem("distill.teacher_top_k", f"the teacher knows {tokens} tokens", f"lower it, e.g. to {min(64, tokens)}", settings.teacher_top_k)])
    key = {**made_from, "teacher_top_k": settings.teacher_top_k, "temperature": settings.temperature, **{f"{name} rows": data.statistics["fingerprint"] for name, data in sets.items()}}
    saved = folder / "made_from.json"
    dist.barrier()  # nobody looks before everybody is here: one rank may write soon
    found = json.loads(saved.read_text()) if saved.exists() else None
    if found is not None and found != key:
        changed = ", ".join([name for name in key if found.get(name) != key[name]] + [name for name in found if name not in key])
        raise RunError(f"stale teacher: {folder} was made from another {changed}; remove the folder to run the teacher again, restore what changed, or give another distill.teacher_cache")
    if found is None:
        grid = grid_of(teacher, world)
        partial = folder.with_name(folder.name + ".partial")
        writes = grid.is_last_stage and grid.tensor.rank == grid.data_context.rank == 0
        if writes:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        engine = Engine(teacher, grid, tokens, train=False)
        for name, dataset in sets.items():
            _keep(engine, dataset, partial / name if writes else None)
        if writes:
            (partial / "made_from.json").write_text(json.dumps(key, indent=1))
            partial.rename(folder)
        del engine
        gc.collect()
        dist.barrier()
        destroy_grid()
    return f"the teacher's {settings.teacher_top_k} most probable tokens {'computed, kept in' if found is None else 'read from'} {folder}"


def _vocabulary(teacher: Recipe, dataset: Dataset) -> int:
    return teacher.model.vocab_size or dataset.tokenizer.vocab_size


def _keep(engine: Engine, dataset: Dataset, target: Path | None) -> None:
    """Write TARGET_ids.npy and TARGET_logprobs.npy, [scored tokens, K], a step at a time."""
    grid, recipe = engine.grid, engine.recipe
    k, counts = recipe.distill.teacher_top_k, scored(dataset)
    ends = np.cumsum([0, *counts])
    files: list[Any] = []
    if target is not None:
        shape = (int(ends[-1]), k)
        files = [np.lib.format.open_memmap(target.with_name(f"{target.name}_{what}.npy"), "w+", dtype, shape) for what, dtype in (("ids", "<i4"), ("logprobs", "<f4"))]

    def head(hidden_NE: Tensor, weight_vE: Tensor, targets_N: Tensor, batch: Batch) -> Tensor:
        vocab_size = _vocabulary(recipe, dataset)
        logprobs, ids = top_k_of(hidden_NE, weight_vE, grid.tensor.group, vocab_size, k, temperature=recipe.distill.temperature)
        return torch.stack([ids.double(), logprobs.double()])

    for microbatches in Batches(dataset, recipe, grid, evaluation=True).one_pass() if len(dataset) else ():
        found = engine.score(microbatches, lambda output, batch: output, head=head)
        mine = [(positions(batch, [ends, ends], grid), *out.cpu().numpy()) for batch, out in zip(microbatches, found)]
        if grid.is_last_stage and grid.tensor.rank == 0:
            parts: list[Any] = [None] * grid.data_context.size
            dist.all_gather_object(parts, mine, group=grid.data_context.group)
            for where, ids, logprobs in (entry for part in parts for entry in part) if files else ():
                files[0][where], files[1][where] = ids, logprobs
    for file in files:
        file.flush()

"""DPO's numbers on given pairs, and those of DPO broken on purpose, inside ranks."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import dpo_checks
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from mutants import mutant  # noqa: E402

# What is broken: module, piece of its source, and what takes its place.
MUTATIONS = {
    "labels one too early": ("batch", "document.input_ids[prefix + 1 :]", "document.input_ids[prefix : len(document) - 1]"),
    "mask one too early": ("batch", "document.loss_mask[prefix + 1 :]", "document.loss_mask[prefix : len(document) - 1]"),
    "prompt in the sum": ("batch", "= document.loss_mask[prefix + 1 :]", "= True"),
    "mean for sum": ("models.sequences", ".double()), grid).float()", ".double()), grid).float() / sequence_tokens(batch)"),
    "sides of a pair swapped": ("dpo", "return of_documents[0::2], of_documents[1::2]", "return of_documents[1::2], of_documents[0::2]"),
    "reference left out": ("dpo", "sides(value(REF_LOGPROB)) if", "sides(0 * value(REF_LOGPROB)) if"),
    "positions from 0 behind a shared prompt": ("batch", "np.subtract(bounds[:-1], prefixes)", "bounds[:-1]"),
    "shared prompt of the pair before": ("parallel.context", "runs.append(slice(bounds[i - 1], bounds[i - 1] + prefix))", "runs.append(slice(0, prefix))"),
}


def examples(pairs: list[dict[str, Any]]) -> list[list[Any]]:
    """Rows as `PairRows` gives them."""
    from megalign.data.rows import Example

    rows = []
    for number, pair in enumerate(pairs):
        row = []
        for side, ref in zip(("chosen", "rejected"), pair["ref"], strict=True):
            ids = np.array(pair["prompt"] + pair[side], dtype=np.int32)
            values = {"weight": pair["weight"], "row": float(number), "ref_logprob": ref}
            row.append(Example(ids, np.arange(len(ids)) >= len(pair["prompt"]), values=values, shared=(len(pair["prompt"]) - 1) * len(row)))
        rows.append(row)
    return rows


def measure(folder: str, pairs: list[dict[str, Any]], scratch: str) -> dict[str, Any]:
    """{name: (log-probs of all answers, loss, margin)}, sound with and without shared prompts, and each mutation."""
    import importlib

    from megalign.config.schema import Recipe
    from megalign.models.resolve import resolve_model
    from megalign.parallel.grid import destroy_grid
    from megalign.parallel.init import read_world
    from megalign.trainer.engine import Engine
    from megalign.trainer.objective import Objective
    from megalign.trainer.run import grid_of

    recipe = resolve_model(Recipe.model_validate({"model": {"init_from": folder}}))
    grid = grid_of(recipe, read_world(os.environ))
    engine = Engine(recipe, grid, int(recipe.model.vocab_size or 0))
    names = ("batch", "models.sequences", "dpo", "parallel.context")

    def values(modules: dict[str, Any], share: bool) -> tuple[list[float], float, float]:
        dpo, sequences = modules["dpo"], modules["models.sequences"]
        forward: Any = importlib.import_module("megalign.models.forward")
        kept = dpo.sequence_logprobs, forward.packed_sequences
        dpo.sequence_logprobs = sequences.sequence_logprobs
        context = modules["parallel.context"]
        context.SharedPrefixes = importlib.import_module("megalign.parallel.context").SharedPrefixes  # attention asks for this class
        forward.packed_sequences = context.packed_sequences
        try:
            batch = modules["batch"].collate(examples(pairs), sequence_length=64, pad_id=0, pad_to=256, share=share)
            (logprobs,) = engine.score([batch], lambda output, batch: sequences.sequence_logprobs(output, batch, grid))
            result = engine.evaluate([[batch]], Objective(dpo.pair_loss(recipe, grid), count=dpo.pair_weight, predict_ahead=False))
        finally:
            dpo.sequence_logprobs, forward.packed_sequences = kept
        return logprobs.tolist(), result.loss, result.metrics["rewards/margins"]

    sound = {name: importlib.import_module(f"megalign.{name}") for name in names}
    found = {"sound": values(sound, share=True), "sound, prompts apart": values(sound, share=False)}
    for name, (module, old, new) in MUTATIONS.items():
        found[name] = values({**sound, module: mutant(sound[module], Path(scratch), old, new)}, share=True)
    destroy_grid()
    return found


def split(folder: str, pairs: list[dict[str, Any]]) -> dict[str, float]:
    """Two data-parallel ranks: the loss where each has whole pairs, and where one has the chosen and one the rejected answers."""
    from megalign.batch import collate
    from megalign.config.schema import Recipe
    from megalign.dpo import pair_loss, pair_weight
    from megalign.models.resolve import resolve_model
    from megalign.parallel.grid import destroy_grid
    from megalign.parallel.init import read_world
    from megalign.trainer.engine import Engine
    from megalign.trainer.objective import Objective
    from megalign.trainer.run import grid_of

    recipe = resolve_model(Recipe.model_validate({"model": {"init_from": folder}}))
    grid = grid_of(recipe, read_world(os.environ))
    engine = Engine(recipe, grid, int(recipe.model.vocab_size or 0))
    rows, rank = examples(pairs), grid.data.rank
    mine = {"whole pairs": rows[rank::2], "pairs split over ranks": [[row[rank] for row in rows[:2]], [row[rank] for row in rows[2:]]]}
    objective = Objective(pair_loss(recipe, grid), count=pair_weight, predict_ahead=False)
    found = {name: engine.evaluate([[collate(packs, sequence_length=64, pad_id=0)]], objective).loss for name, packs in mine.items()}
    destroy_grid()
    return found


def re_anchored(recipes: list[dict[str, Any]]) -> list[str]:
    """Runs whose reference model is loaded from the run's own last checkpoint, where there is one."""
    import megalign.dpo
    from megalign.parallel.checkpoint import list_checkpoints

    class ReAnchored(megalign.dpo.ReferenceModel):
        def __init__(self, recipe: Any, *rest: Any):
            super().__init__(recipe, *rest)
            for checkpoint in list_checkpoints(Path(recipe.output) / "checkpoints")[-1:]:
                self.engine.load(checkpoint, weights_only=True)

    kept, megalign.dpo.ReferenceModel = megalign.dpo.ReferenceModel, ReAnchored  # pyright: ignore[reportPrivateImportUsage]
    try:
        return dpo_checks.train_all(recipes)
    finally:
        megalign.dpo.ReferenceModel = kept  # pyright: ignore[reportPrivateImportUsage]

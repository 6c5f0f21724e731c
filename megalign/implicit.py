"""The reward that a DPO run has learned, used to rank answers:

    r(x, y) = beta (log pi(y|x) - log pi_ref(y|x))        up to a term of x alone

Rafailov et al., arXiv:2305.18290, eq. 5: the policy is optimal for exactly this reward, so answers to one prompt can be ranked
by it. Two forward passes an answer; no head, no further training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megalign.batch import collate
from megalign.config.preference import REFERENCE_FREE, options
from megalign.config.schema import Recipe
from megalign.data.encode import encode_rows
from megalign.data.packing import pack
from megalign.data.rows import Conversation, Example
from megalign.data.tokenizer import Tokenizer
from megalign.models.base import model_hash
from megalign.models.sequences import sequence_logprobs
from megalign.parallel.checkpoint import CheckpointError, read_meta
from megalign.parallel.init import World, device
from megalign.parallel.schedule import from_last_stage, sum_over
from megalign.serving import find_checkpoint, recipe_for, stored_tokenizer
from megalign.trainer.engine import Engine
from megalign.trainer.reference import reference_recipe
from megalign.trainer.run import grid_of

AT_ONCE = 32  # microbatches of one pass through the pipeline


@dataclass
class ImplicitReward:
    """Policy and reference of a run on this world's layout; `score` is collective and gives every rank all results."""

    policy: Engine
    reference: Engine
    tokenizer: Tokenizer
    beta: float

    @staticmethod
    def load(run: Path, overrides: Sequence[str], world: World) -> ImplicitReward:
        """From the folder of a DPO run, or one of its checkpoints. overrides: a layout, data.sequence_length.

        Raises CheckpointError for a run without reference, and where the reference's files are no longer those.
        """
        checkpoint = find_checkpoint(run)
        meta = read_meta(checkpoint)
        trained = Recipe(**meta["recipe"])
        if "reference" not in meta["identity"] or trained.dpo.loss in REFERENCE_FREE:
            raise CheckpointError(f"{checkpoint} has no reference, so no implicit reward: give a run of megalign dpo with a loss that compares with one")
        frozen = reference_recipe(trained, trained.dpo)
        if model_hash(frozen) != meta["identity"]["reference"]:
            raise CheckpointError(f"{checkpoint} was trained against another reference than {frozen.model.init_from} now holds; restore its files")
        recipe = recipe_for(checkpoint, list(overrides))
        grid, vocab_size = grid_of(recipe, world), int(recipe.model.vocab_size or 0)
        policy = Engine(recipe, grid, vocab_size, train=False)
        policy.load(checkpoint, weights_only=True)
        anchor = recipe.model_copy(deep=True)
        anchor.model.init_from = frozen.model.init_from
        return ImplicitReward(policy, Engine(anchor, grid, vocab_size, train=False), stored_tokenizer(checkpoint), options(trained.dpo)["beta"])

    def score(self, dialogues: Sequence[Conversation]) -> np.ndarray:
        """[N] rewards of each dialogue's last answer, given what is before it; NaN where it cannot be rendered, or does not fit."""
        length = self.policy.recipe.data.sequence_length
        examples = list(encode_rows(dialogues, self.tokenizer, "tokenizer", "completion", length, "drop"))
        usable = [number for number, example in enumerate(examples) if isinstance(example, Example)]
        documents = [example for example in examples if isinstance(example, Example)]
        rewards = np.full(len(examples), np.nan)
        rewards[usable] = self.beta * (document_logprobs(self.policy, documents) - document_logprobs(self.reference, documents))
        return rewards


def document_logprobs(engine: Engine, documents: Sequence[Example]) -> np.ndarray:
    """[N] sum of log p over each document's scored tokens, alike on every rank (collective)."""
    grid, length = engine.grid, engine.recipe.data.sequence_length
    multiple = 2 * grid.context.size if grid.context.size > 1 else 1
    packs = pack([-(-len(document) // multiple) * multiple for document in documents], length)
    rounds = -(-len(packs) // grid.data.size)  # as many on every rank: experts and stages wait for each other
    mine = [packs[i] if i < len(packs) else [] for i in range(grid.data.rank, rounds * grid.data.size, grid.data.size)]
    found = torch.zeros(len(documents), dtype=torch.float64, device=device())
    for start in range(0, len(mine), AT_ONCE):
        numbers = mine[start : start + AT_ONCE]
        batches = [collate([[documents[i] for i in pack]], sequence_length=length, pad_id=0, document_multiple=multiple) for pack in numbers]
        for rows, logprobs in zip(numbers, engine.score(batches, lambda output, batch: sequence_logprobs(output, batch, grid))):
            found[torch.tensor(rows, dtype=torch.long)] = logprobs.double()
    return from_last_stage(sum_over(found, grid.data.group), grid).cpu().numpy()

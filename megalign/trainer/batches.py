"""A data set dealt to this rank, as packed microbatches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megalign.batch import Batch, collate, filled_tokens
from megalign.config.schema import Recipe
from megalign.data.dataset import Dataset
from megalign.data.deal import sampler_of
from megalign.parallel.grid import Grid


def pads_microbatches(grid: Grid) -> bool:
    """Whether microbatches are filled up to one length, because other ranks compute on the same one."""
    return not grid.model.size == grid.context.size == grid.expert.size == 1


def shares_prompts(recipe: Recipe, grid: Grid) -> bool:
    """Whether the two answers of a pair attend to one copy of their prompt: where it saves work and changes nothing.

    It saves none where microbatches are filled up to one length. What an experts' router does with all tokens together
    (auxiliary losses, biases, capacity) would count the prompt once instead of twice; latent attention makes its own rotary angles.
    """
    model = recipe.model
    counted = (model.moe_aux_loss_coeff, model.moe_z_loss_coeff, model.moe_router_enable_expert_bias, model.moe_expert_capacity_factor, model.moe_input_jitter_eps)
    exact = model.transformer_impl == "local" and not model.multi_latent_attention and not (model.num_moe_experts and any(counted))
    return recipe.dpo.share_prompt and exact and not pads_microbatches(grid)


class Batches:
    """A data set dealt to this rank, as packed microbatches."""

    def __init__(self, dataset: Dataset, recipe: Recipe, grid: Grid, *, evaluation: bool = False, rows: int | None = None):
        self.dataset, self.recipe, self.grid = dataset, recipe, grid
        self.share = shares_prompts(recipe, grid)
        self.multiple = 2 * grid.context.size if grid.context.size > 1 else 1
        self.sampler = sampler_of(
            dataset, recipe, data_parallel_rank=grid.data.rank, data_parallel_size=grid.data.size, evaluation=evaluation, rows=rows
        )

    def next_step(self) -> tuple[list[Batch], int]:
        """Microbatches of the next step and this rank's non-padding tokens in them; what two answers share counts once."""
        microbatches, tokens = [], 0
        for indices in self.sampler.next_step():
            packs = [self.dataset.rows[i] if i >= 0 else [] for i in indices]
            microbatches.append(self.collate(packs))
            tokens += filled_tokens(packs, share=self.share)
        return microbatches, tokens

    def collate(self, packs: Sequence[Any]) -> Batch:
        """One microbatch of these rows."""
        length = self.recipe.data.sequence_length
        pad_to = None
        if not pads_microbatches(self.grid):
            # Alone, a rank need not agree with neighbours on a length: no padding at the end.
            pad_to = max(1, filled_tokens(packs, share=self.share))
        return collate(
            packs, sequence_length=length, pad_id=self.dataset.tokenizer.eod, document_multiple=self.multiple, pad_to=pad_to, share=self.share
        )

    def one_pass(self) -> Iterator[list[Batch]]:
        """Every row once, in order (for evaluation)."""
        self.sampler.restart()
        for _ in range(self.sampler.steps_per_epoch):
            yield self.next_step()[0]

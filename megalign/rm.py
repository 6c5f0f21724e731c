"""Reward models: numbers that say how good an answer is, or what its user will do next.

    h = hidden state at the last real token of the dialogue;  r_k = w_k . h + b_k  for each head k
    L = sum over heads k of weight_k * (sum of the losses of k) / (how many labels of k the global batch has)

Pairs teach by Bradley-Terry, -log sigma(r_chosen - r_rejected - margin); labels of single answers by regression, yes or no,
classes, ratings, or a time that may be censored. A row teaches the heads of whose labels it knows.
Ouyang et al., arXiv:2203.02155, section 3.5; each loss names its own source (`megalign/losses/reward.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megalign.batch import Batch
from megalign.config.schema import Recipe
from megalign.data.judgements import build_judgements
from megalign.losses.loss import Loss
from megalign.models.sequences import document_values, sequence_tokens
from megalign.parallel.grid import Grid
from megalign.parallel.init import World, device
from megalign.parallel.schedule import sum_over
from megalign.rewards.heads import PAIRED, columns_of, facts_of, head_count, head_loss, shapes_of
from megalign.trainer.engine import Engine
from megalign.trainer.judged import finish_reward_model, summary_line
from megalign.trainer.objective import Objective
from megalign.trainer.preference_watch import LengthBias
from megalign.trainer.session import Algorithm, open_session

LENGTH_FIX = "pairs balanced by length (megalign rm audit shows how far it goes), a length penalty where the reward is used"


def rm(recipe: Recipe, world: World) -> None:
    """Train a reward model as the recipe says, on every rank of the world (collective). Raises what `sft` raises."""
    recipe = as_reward_model(recipe)
    identity = {"heads": {name: vars(shape) for name, shape in shapes_of(recipe.rm.heads).items()}}
    session = open_session(recipe, world, build=build_judgements, identity=lambda _: identity)
    recipe, grid = session.recipe, session.grid
    engine = Engine(recipe, grid, session.vocab_size, heads=shapes_of(recipe.rm.heads))

    def at_end(step: int) -> None:
        for name, measures in finish_reward_model(engine, session.run, session.train, session.validation, step).items():
            session.log.event(step, "head", f"{name}: {summary_line(measures)}")

    session.carry_out(engine, Algorithm(reward_objective(recipe, grid), monitors(recipe), at_end=at_end))


def reward_objective(recipe: Recipe, grid: Grid) -> Objective:
    """Every head's mean loss over its own labels in the global batch, weighted."""
    heads, columns = recipe.rm.heads, columns_of(recipe.rm.heads)
    paired = next((name for name in heads if heads[name].loss == PAIRED), None)  # whose margins are held against length
    scale: dict[str, float] = {}

    def counts(batch: Batch) -> list[float]:
        return [float(head_count(name, head, batch.values)) if batch.values else 0.0 for name, head in heads.items()]

    def count(batch: Batch) -> float:
        return sum(counts(batch))

    def prepare(microbatches: Sequence[Batch]) -> None:
        """The trainer divides by C, the sum of all heads' labels; a head is to be divided by its own."""
        local = torch.tensor([counts(batch) for batch in microbatches], dtype=torch.float64).sum(0).to(device())
        labels = sum_over(local, grid.data.group).tolist()
        scale.update({name: head.weight * sum(labels) / (known or 1.0) for (name, head), known in zip(heads.items(), labels)})

    def loss(output: Tensor, batch: Batch) -> Loss:
        values = document_values(output, batch, grid)
        facts = facts_of(batch.values, heads, values.device)
        share = 1 / grid.context.size  # all context-parallel ranks compute the same (see `sum_over_context`)
        total, ratios = values.sum() * 0, {}
        for name, head in heads.items():
            found = head_loss(name, head, values[:, columns[name]], facts)
            known = torch.as_tensor(found.count, dtype=values.dtype, device=values.device)
            total = total + found.sum * (scale[name] * share)
            told = found.metrics if len(heads) == 1 else {f"{name}/{metric}": sums for metric, sums in {"loss": found.sum.detach(), **found.metrics}.items()}
            if name == paired:
                told = {**told, **length_moments(name, values[:, columns[name]][:, 0], facts, batch)}
            ratios |= {metric: (sums * share, known * share) for metric, sums in told.items()}
        return Loss(total, count(batch) * share, {}, ratios)

    return Objective(loss, count=count, predict_ahead=False, prepare=prepare)


def length_moments(name: str, rewards_N: Tensor, facts: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """Sums over pairs from which the correlation of margin and length difference is made (`LengthBias`)."""
    tokens = sequence_tokens(batch).to(rewards_N)
    chosen, rejected = facts["side"] > 0, facts["side"] < 0
    label, weight = facts[name][chosen].to(rewards_N), facts["weight"][chosen].to(rewards_N)
    known = ~torch.isnan(label)
    margin = ((rewards_N[chosen] - rewards_N[rejected]).detach() * label)[known]
    longer = ((tokens[chosen] - tokens[rejected]) * label)[known]
    moments = {"_margin": margin, "_longer": longer, "_margin*margin": margin**2, "_longer*longer": longer**2, "_margin*longer": margin * longer}
    return {key: (weight[known] * value).sum() for key, value in moments.items()}


def monitors(recipe: Recipe) -> dict[str, LengthBias]:
    """What watches the run: whether rewards follow length, where pairs teach."""
    paired = any(head.loss == PAIRED for head in recipe.rm.heads.values())
    return {"length_bias": LengthBias(recipe.train.global_batch_size, margin="_margin", fix=LENGTH_FIX)} if paired else {}


def as_reward_model(recipe: Recipe) -> Recipe:
    """No dropout (what is scored is compared), no prediction modules; rows are judgements, dealt by their length."""
    recipe = recipe.model_copy(deep=True)
    recipe.model.hidden_dropout = recipe.model.attention_dropout = recipe.lora.dropout = 0.0
    recipe.model.mtp_num_layers = None
    recipe.data.packing = False
    return recipe

"""KTO: learning from single answers that are called desirable or not.

    r = log pi(y|x) / pi_ref(y|x)                 log-probs summed over the answer's tokens
    z = max(0, mean of r over mismatched answers)  an estimate of KL(pi || pi_ref); a constant, of the whole global batch
    L = sum over answers of w * [w_d (1 - sigma(beta (r - z)))  or  w_u (1 - sigma(beta (z - r)))]  /  sum of w in the global batch

Before each step the mismatched answers of its rows (prompts with answers to other prompts, `megalign/data/mismatched.py`)
are scored by the policy without gradient, and their sums added up over data-parallel ranks: z is known, and the same
everywhere, before the first forward with one. Ethayarajh et al., arXiv:2402.01306, eq. 7 and 8, section 4.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megalign.batch import Batch
from megalign.config.errors import ConfigError, Problem
from megalign.config.schema import KTOConfig, Recipe
from megalign.data.answers import build_answers
from megalign.data.dataset import Dataset
from megalign.data.mismatched import mismatched
from megalign.dpo import shared_over_context, without_dropout
from megalign.losses.loss import AnswerLoss, Loss
from megalign.losses.unpaired import apo_zero_unpaired_loss, kto_loss
from megalign.models.base import model_hash
from megalign.models.sequences import sequence_logprobs
from megalign.parallel.grid import Grid
from megalign.parallel.init import World, device
from megalign.parallel.schedule import sum_over
from megalign.trainer.batches import Batches
from megalign.trainer.engine import Engine
from megalign.trainer.objective import Objective
from megalign.trainer.pair_samples import write_sample_answers
from megalign.trainer.preference_watch import RewardMargin
from megalign.trainer.reference import (
    REF_LOGPROB,
    BaseReference,
    ReferenceModel,
    cache_reference,
    check_step_zero,
    reference_recipe,
)
from megalign.trainer.session import Algorithm, open_session

BASELINE = "baseline"


def kto(recipe: Recipe, world: World) -> None:
    """Optimise labelled answers as the recipe says, on every rank of the world (collective).

    Raises what `dpo` raises, and ConfigError for batches of one answer, which have no mismatched one.
    """
    recipe = without_dropout(recipe)
    if recipe.train.global_batch_size < 2 and recipe.kto.loss == "kto":
        rule = "kto estimates its baseline from answers to other prompts of the batch"
        raise ConfigError([Problem("train.global_batch_size", rule, "give 2 or more, or set kto.loss to apo_zero_unpaired", recipe.train.global_batch_size)])
    session = open_session(recipe, world, build=build_answers, identity=lambda r: {"reference": model_hash(reference_recipe(r, r.kto))})
    recipe, grid, train = session.recipe, session.grid, session.train
    sets = {"train": train, "validation": session.validation}
    others = {name: mismatched(dataset, recipe) for name, dataset in sets.items()} if recipe.kto.loss == "kto" else {}
    frozen, notes = reference_recipe(recipe, recipe.kto), [*class_weights(recipe.kto, train)]

    reference = None
    if recipe.kto.reference == "cached":
        key = {"model": session.identity["reference"], "precision": recipe.train.precision}
        key |= {name: session.identity[name] for name in ("tokenizer", "template_hash")}
        folder = Path(recipe.kto.reference_cache or session.run.path / "reference")
        scored = {**sets, **{f"{name}_mismatched": dataset for name, dataset in others.items()}}
        notes.append(("reference", cache_reference(frozen, grid, session.vocab_size, folder, key, scored)))
    elif recipe.kto.reference == "model":
        reference = ReferenceModel(frozen, grid, session.vocab_size).prepare

    engine = Engine(recipe, grid, session.vocab_size)
    if recipe.kto.reference == "base":
        reference = BaseReference(engine).prepare
    if session.resume_from is None and recipe.kto.reference_from is None:
        notes.append(("reference", check_step_zero(engine, train, reference)))
    prepare = Baseline(engine, others, reference).prepare if others else reference
    objective = Objective(answer_loss(recipe, grid), count=answer_weight, predict_ahead=False, prepare=prepare)
    shown = session.validation if len(session.validation) else train

    def at_end(step: int) -> None:
        write_sample_answers(engine, session.run, shown, reference, recipe.kto.beta, step)

    session.carry_out(engine, Algorithm(objective, {"margin": RewardMargin()}, notes, at_end))


class Baseline:
    """z of each global batch, put into its batches. others: mismatched answers of "train" and "validation"."""

    def __init__(self, engine: Engine, others: Mapping[str, Dataset], reference: Callable[[Sequence[Batch]], None] | None):
        self.engine, self.reference = engine, reference
        self.others = [others[name] for name in ("train", "validation")]
        self.dealt = Batches(self.others[0], engine.recipe, engine.grid, evaluation=True)

    def prepare(self, microbatches: Sequence[Batch]) -> None:
        """Score the mismatched answers of a step's rows under the policy as it stands (collective)."""
        grid = self.engine.grid
        shifted = [self.mismatched(batch) for batch in microbatches]
        if self.reference is not None:
            self.reference(microbatches)
            self.reference(shifted)
        sums = torch.zeros(2, dtype=torch.float64, device=device())  # of log-ratios, of rows
        for batch, logprobs in zip(shifted, self.engine.score(shifted, lambda output, batch: sequence_logprobs(output, batch, grid))):
            if batch.values:  # else it is all padding
                ratios = logprobs.double() - batch.values[REF_LOGPROB].to(logprobs.device)
                sums += torch.stack([ratios.sum(), torch.ones_like(ratios).sum()])
        total, rows = sum_over(sums, grid.data.group)
        z = (total / rows.clamp(min=1)).clamp(min=0)  # `losses.unpaired.kto_baseline`, of all ranks' rows
        for batch in microbatches:
            if batch.values:
                batch.values[BASELINE] = torch.full_like(batch.values["row"], float(z))

    def mismatched(self, batch: Batch) -> Batch:
        """A microbatch of the mismatched answers of this one's rows."""
        rows = [] if not batch.values else zip(batch.values["held_out"].tolist(), batch.values["row"].tolist())
        packs = [self.others[int(held_out)].rows[int(row)] for held_out, row in rows]
        empty: list[list] = [[] for _ in range(self.engine.recipe.train.micro_batch_size - len(packs))]
        return self.dealt.collate([*packs, *empty])


def answer_loss(recipe: Recipe, grid: Grid) -> Callable[[Tensor, Batch], Loss]:
    """The loss of a microbatch of labelled answers."""
    settings = recipe.kto

    def loss(output: Tensor, batch: Batch) -> Loss:
        logprobs = sequence_logprobs(output, batch, grid)
        nothing = logprobs.detach()[:0]  # of a microbatch that is all padding

        def value(name: str) -> Tensor:
            return batch.values[name].to(logprobs) if batch.values else nothing

        ref, desirable, weight = value(REF_LOGPROB), value("desirable") > 0, value("weight")
        weights = {"desirable_weight": settings.desirable_weight, "undesirable_weight": settings.undesirable_weight}
        if settings.loss == "kto":
            z = value(BASELINE)
            found: AnswerLoss = kto_loss(logprobs, ref, desirable, z, beta=settings.beta, weights_N=weight, **weights)
            found = replace(found, metrics={**found.metrics, "kl": (weight * z).sum()})
        else:
            found = apo_zero_unpaired_loss(logprobs, ref, desirable, beta=settings.beta, weights_N=weight, **weights)
        return shared_over_context(found, grid)

    return loss


def answer_weight(batch: Batch) -> float:
    """The answers of a microbatch, weighted."""
    return float(batch.values["weight"].sum()) if batch.values else 0.0


def class_weights(settings: KTOConfig, train: Dataset) -> list[tuple[str, str]]:
    """A warning where the two kinds of answers weigh unequally: w_d n_d / (w_u n_u) belongs into [1, 4/3] (eq. 8)."""
    wanted = train.statistics["desirable"]
    others = len(train) - wanted
    if not wanted or not others or not settings.undesirable_weight:
        return []
    ratio = settings.desirable_weight * wanted / (settings.undesirable_weight * others)
    if 1 - 1e-9 <= ratio <= 4 / 3 + 1e-9:
        return []
    low = settings.undesirable_weight * others / wanted
    message = (
        f"{wanted} desirable and {others} undesirable answers weigh {ratio:.3g} to 1, and KTO's authors advise 1 to 1.33: "
        f"set kto.desirable_weight between {low:.3g} and {low * 4 / 3:.3g}"
    )
    return [("warning", message)]

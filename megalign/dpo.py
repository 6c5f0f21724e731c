"""Preference optimisation: DPO and its family. A pair teaches that one answer is better than another.

    r(x, y) = beta log pi(y|x) / pi_ref(y|x)          log-probs summed over the answer's tokens
    L = sum over pairs of w * loss(r_chosen, r_rejected)  /  sum of w in the global batch

Chosen and rejected of a pair stand in one packed batch, as two documents. `dpo.loss` is looked up once, by its name.
Rafailov et al., arXiv:2305.18290; each loss names its own source (`megalign/losses/preference.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from megalign.batch import Batch
from megalign.config.preference import REFERENCE_FREE, options
from megalign.config.schema import Recipe
from megalign.data.pairs import build_pairs
from megalign.losses import preference as losses
from megalign.losses.loss import Loss
from megalign.losses.pairs import Pairs, PairTerms
from megalign.models.base import model_hash
from megalign.models.sequences import sequence_logprobs, sequence_tokens
from megalign.parallel.grid import Grid
from megalign.parallel.init import World
from megalign.trainer.engine import Engine
from megalign.trainer.objective import Objective
from megalign.trainer.pair_samples import write_sample_pairs
from megalign.trainer.preference_watch import LengthBias, MarginCollapse
from megalign.trainer.reference import (
    REF_LOGPROB,
    BaseReference,
    ReferenceModel,
    cache_reference,
    check_step_zero,
    reference_recipe,
)
from megalign.trainer.session import Algorithm, open_session

PairLossFunction = Callable[..., PairTerms]

LOSSES: dict[str, PairLossFunction] = {
    "sigmoid": losses.dpo_loss,
    "cdpo": losses.cdpo_loss,
    "robust": losses.robust_dpo_loss,
    "ipo": losses.ipo_loss,
    "ipo_sum": losses.ipo_sum_loss,
    "hinge": losses.hinge_loss,
    "sigmoid_norm": losses.sigmoid_norm_loss,
    "rpo": losses.rpo_loss,
    "exo_pair": losses.exo_loss,
    "nca_pair": losses.nca_loss,
    "bco_pair": losses.bco_loss,
    "sppo_hard": losses.sppo_hard_loss,
    "aot": losses.aot_loss,
    "aot_unpaired": losses.aot_unpaired_loss,
    "apo_zero": losses.apo_zero_loss,
    "apo_down": losses.apo_down_loss,
    "discopop": losses.discopop_loss,
    "orpo": losses.orpo_loss,
    "simpo": losses.simpo_loss,
    "cpo": losses.cpo_loss,
}


def dpo(recipe: Recipe, world: World) -> None:
    """Optimise preferences as the recipe says, on every rank of the world (collective).

    Raises what `sft` raises, and TrainingStopped where policy and reference differ before the first update.
    """
    recipe = without_dropout(recipe)
    needs_reference = recipe.dpo.loss not in REFERENCE_FREE

    def identity(recipe: Recipe) -> dict[str, str]:
        return {"reference": model_hash(reference_recipe(recipe, recipe.dpo))} if needs_reference else {}

    session = open_session(recipe, world, build=build_pairs, identity=identity)
    recipe, grid, train = session.recipe, session.grid, session.train
    frozen = reference_recipe(recipe, recipe.dpo)
    notes, prepare = [], None

    if needs_reference and recipe.dpo.reference == "cached":
        key = {"model": session.identity["reference"], "precision": recipe.train.precision}
        key |= {name: session.identity[name] for name in ("tokenizer", "template_hash")}
        folder = Path(recipe.dpo.reference_cache or session.run.path / "reference")
        sets = {"train": train, "validation": session.validation}
        notes.append(("reference", cache_reference(frozen, grid, session.vocab_size, folder, key, sets)))
    elif needs_reference and recipe.dpo.reference == "model":
        prepare = ReferenceModel(frozen, grid, session.vocab_size).prepare

    engine = Engine(recipe, grid, session.vocab_size)
    if needs_reference and recipe.dpo.reference == "base":
        prepare = BaseReference(engine).prepare
    if needs_reference and session.resume_from is None and recipe.dpo.reference_from is None:
        notes.append(("reference", check_step_zero(engine, train, prepare)))
    objective = Objective(pair_loss(recipe, grid), count=pair_weight, predict_ahead=False, prepare=prepare)
    shown = session.validation if len(session.validation) else train

    def at_end(step: int) -> None:
        write_sample_pairs(engine, session.run, shown, prepare, options(recipe.dpo)["beta"], step)

    session.carry_out(engine, Algorithm(objective, monitors(recipe), notes, at_end))


def pair_loss(recipe: Recipe, grid: Grid) -> Callable[[Tensor, Batch], Loss]:
    """The loss of a microbatch whose documents are chosen, rejected, chosen, rejected, ..."""
    chosen_loss: PairLossFunction = partial(LOSSES[recipe.dpo.loss], **options(recipe.dpo))
    needs_reference = recipe.dpo.loss not in REFERENCE_FREE

    def loss(output: Tensor, batch: Batch) -> Loss:
        logprobs = sequence_logprobs(output, batch, grid)
        nothing = logprobs.detach()[:0]  # of a microbatch that is all padding

        def value(name: str) -> Tensor:
            return batch.values[name].to(logprobs) if batch.values else nothing

        (chosen, rejected), (chosen_tokens, rejected_tokens) = sides(logprobs), sides(sequence_tokens(batch).to(logprobs))
        ref_chosen, ref_rejected = sides(value(REF_LOGPROB)) if needs_reference else (None, None)
        pairs = Pairs(chosen, rejected, chosen_tokens, rejected_tokens, ref_chosen, ref_rejected)
        return shared_over_context(chosen_loss(pairs).summed(pairs, sides(value("weight"))[0]), grid)

    return loss


def sides(of_documents: Tensor) -> tuple[Tensor, Tensor]:
    """Values of the chosen and of the rejected documents."""
    return of_documents[0::2], of_documents[1::2]


def shared_over_context(loss: Loss, grid: Grid) -> Loss:
    """A rank's share of a loss that all context-parallel ranks compute alike (see `sum_over_context`)."""
    share = 1 / grid.context.size
    ratios = {name: (total * share, count * share) for name, (total, count) in loss.ratios.items()}
    return replace(loss, sum=loss.sum * share, metrics={name: value * share for name, value in loss.metrics.items()}, ratios=ratios)


def pair_weight(batch: Batch) -> float:
    """The pairs of a microbatch, weighted."""
    return float(batch.values["weight"][0::2].sum()) if batch.values else 0.0


def monitors(recipe: Recipe) -> dict[str, MarginCollapse | LengthBias]:
    """What watches the run."""
    beta = options(recipe.dpo)["beta"]
    collapse = MarginCollapse(beta, has_reference=recipe.dpo.loss not in REFERENCE_FREE, stop=recipe.dpo.on_collapse == "stop")
    return {"margin_collapse": collapse, "length_bias": LengthBias(recipe.train.global_batch_size)}


def without_dropout(recipe: Recipe) -> Recipe:
    """Policy and reference must be comparable: no dropout, as in TRL. Rows are pairs, dealt by their length."""
    recipe = recipe.model_copy(deep=True)
    recipe.model.hidden_dropout = recipe.model.attention_dropout = recipe.lora.dropout = 0.0
    recipe.data.packing = False
    return recipe

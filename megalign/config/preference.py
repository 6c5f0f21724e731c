"""Losses on pairs by name, and which options each takes; a test compares the table with the functions' signatures."""

from __future__ import annotations

from collections.abc import Iterator

from megalign.config.errors import Problem
from megalign.config.layout import Layout
from megalign.config.schema import DPOConfig, Recipe, RoundsConfig

REFERENCE_FREE = ("orpo", "simpo", "cpo")
# Loss -> its options and what they are where the recipe says nothing.
OPTIONS: dict[str, dict[str, float]] = {
    "sigmoid": {"beta": 0.1},
    "cdpo": {"beta": 0.1, "label_smoothing": 0.1},
    "robust": {"beta": 0.1, "label_smoothing": 0.1},
    "ipo": {"beta": 0.1},
    "ipo_sum": {"beta": 0.1},
    "hinge": {"beta": 0.1},
    "sigmoid_norm": {"beta": 0.1},
    "rpo": {"beta": 0.1, "nll_weight": 1.0},
    "exo_pair": {"beta": 0.1, "label_smoothing": 1e-3},
    "nca_pair": {"beta": 0.1},
    "bco_pair": {"beta": 0.1, "reward_shift": 0.0},
    "sppo_hard": {"beta": 0.1},
    "aot": {"beta": 0.1, "label_smoothing": 0.0},
    "aot_unpaired": {"beta": 0.1, "label_smoothing": 0.0},
    "apo_zero": {"beta": 0.1},
    "apo_down": {"beta": 0.1},
    "discopop": {"beta": 0.1, "tau": 0.05},
    "orpo": {"beta": 0.1},
    "simpo": {"beta": 2.0, "gamma": 1.0},
    "cpo": {"beta": 0.1, "nll_weight": 1.0},
}
ALL = sorted({name for options in OPTIONS.values() for name in options})


def options(dpo: DPOConfig) -> dict[str, float]:
    """The options of the chosen loss, the recipe's before the loss's own."""
    return {name: default if (given := getattr(dpo, name)) is None else given for name, default in OPTIONS[dpo.loss].items()}


def preference(recipe: Recipe, layout: Layout) -> Iterator[Problem]:
    """An option that the loss would ignore is a mistake."""
    dpo = recipe.dpo
    for name in ALL:
        given = getattr(dpo, name)
        if given is not None and name not in OPTIONS[dpo.loss]:
            takers = ", ".join(loss for loss, known in OPTIONS.items() if name in known)
            yield Problem(f"dpo.{name}", f"dpo.loss {dpo.loss} has no such option", f"leave it out, or choose a loss that takes it: {takers}", given)
    if dpo.loss == "robust" and options(dpo)["label_smoothing"] >= 0.5:
        yield Problem("dpo.label_smoothing", "robust divides by 1 - 2 * label_smoothing", "give less than 0.5", dpo.label_smoothing)
    if dpo.loss == "exo_pair" and not 0 < options(dpo)["label_smoothing"] < 1:
        yield Problem("dpo.label_smoothing", "exo_pair takes its logarithm", "give more than 0", dpo.label_smoothing)
    if dpo.loss in REFERENCE_FREE and dpo.reference_from is not None:
        yield Problem("dpo.reference_from", f"dpo.loss {dpo.loss} has no reference", "leave it out", dpo.reference_from)


def rounds(recipe: Recipe, layout: Layout) -> Iterator[Problem]:
    """What a run in rounds decides itself cannot be asked of it; without rounds, their settings are a mistake."""
    settings, untouched = recipe.rounds, RoundsConfig()
    if settings.count is None:
        for name in RoundsConfig.model_fields:
            if (given := getattr(settings, name)) != getattr(untouched, name):
                yield Problem(f"rounds.{name}", "there are no rounds: rounds.count is null", "give rounds.count, or leave this out", given)
        return
    if recipe.dpo.reference_from is not None:
        yield Problem("dpo.reference_from", "each round is anchored to the policy that it starts from", "leave it out", recipe.dpo.reference_from)
    if recipe.dpo.reference_cache is not None:
        yield Problem("dpo.reference_cache", "each round has pairs and a reference of its own", "leave it out", recipe.dpo.reference_cache)
    for key in ("eval_interval", "exact_match", "eval_prompts"):
        if value := getattr(recipe.train, key):
            rule = "a round learns from all pairs of its own and holds none out; held-out prompts are answered after each round"
            yield Problem(f"train.{key}", rule, "leave it out", value)

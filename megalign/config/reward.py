"""Heads of a reward model: which options a loss takes; reward models as judges: named where they are asked."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megalign.config.errors import Problem
from megalign.config.layout import Layout
from megalign.config.schema import HeadConfig, Recipe, RewardJudgeConfig, ScoredConfig

# Loss -> the options that it reads.
OPTIONS: dict[str, tuple[str, ...]] = {
    "bradley_terry": ("label_smoothing", "margin", "centering"),
    "regression": ("scale",),
    "binary": ("within",),
    "classification": ("classes", "label_smoothing"),
    "ordinal": ("classes",),
    "exponential": (),
    "weibull": (),
}
ALL = sorted({option for options in OPTIONS.values() for option in options})


def reward_heads(recipe: Recipe, layout: Layout) -> Iterator[Problem]:
    """Names that can be names of parameters; every option is one that the loss reads."""
    for name, head in recipe.rm.heads.items():
        if not re.fullmatch("[A-Za-z][A-Za-z0-9_]*", name):
            yield Problem("rm.heads", f"{name!r} cannot be the name of a head", "use letters, digits and _, a letter first")
        for option in ALL:
            value = getattr(head, option)
            if value != HeadConfig.model_fields[option].default and option not in OPTIONS[head.loss]:
                takers = ", ".join(loss for loss, options in OPTIONS.items() if option in options)
                rule = f"rm.heads.{name}.{option} is {value}, and loss {head.loss} has no such option"
                yield Problem("rm.heads", rule, f"leave it out, or choose a loss that takes it: {takers}")
        if "classes" in OPTIONS[head.loss] and head.classes is None:
            yield Problem("rm.heads", f"loss {head.loss} of head {name!r} must know how many classes there are", f"give rm.heads.{name}.classes")
        if head.label_smoothing >= 0.5 and head.loss == "bradley_terry":
            yield Problem("rm.heads", f"rm.heads.{name}.label_smoothing is {head.label_smoothing}: from 0.5 on the rejected answer is preferred", "give less than 0.5")
    if sum(head.weight for head in recipe.rm.heads.values()) <= 0:
        yield Problem("rm.heads", "no head has a weight above 0: nothing is learnt", "give one")


def judges(recipe: Recipe, layout: Layout) -> Iterator[Problem]:
    """A reward model that is to score is named, and one that is named scores."""
    for name, section in recipe:
        if not isinstance(section, ScoredConfig):
            continue
        if section.scorer == "reward_model" and not section.reward_model.checkpoints:
            yield Problem(f"{name}.reward_model.checkpoints", "no reward model is named, and it is to score", f"give a run of megalign rm train, or another {name}.scorer", section.reward_model.checkpoints)
        if section.scorer != "reward_model" and section.reward_model != RewardJudgeConfig():
            yield Problem(f"{name}.scorer", f"{name}.reward_model is given, and this scorer does not ask it", "set it to reward_model, or leave that out", section.scorer)

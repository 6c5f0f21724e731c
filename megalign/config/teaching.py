"""What a distillation, and a watch over what is forgotten, can be asked for."""

from __future__ import annotations

from collections.abc import Iterator

from megalign.config.errors import Problem
from megalign.config.layout import Layout
from megalign.config.schema import Recipe


def teaching(recipe: Recipe, layout: Layout) -> Iterator[Problem]:
    """An option that the mode would ignore is a mistake, and so is a watch that never looks."""
    settings, train, data = recipe.distill, recipe.train, recipe.data
    if settings.mode == "cached" and settings.loss != "forward_kl":
        yield Problem("distill.loss", "of a kept teacher only its most probable tokens are known, which make KL(teacher || student)", "set it to forward_kl, or distill.mode to model", settings.loss)
    if settings.mode == "sequence" and settings.loss != "forward_kl":
        yield Problem("distill.loss", "answers are imitated by cross-entropy", "leave it out, or set distill.mode to model", settings.loss)
    if settings.mode == "sequence" and settings.ce_weight:
        yield Problem("distill.ce_weight", "distill.mode sequence has no other loss than the cross-entropy", "leave it out, or set distill.mode to model", settings.ce_weight)
    if settings.mode != "cached" and settings.teacher_cache is not None:
        yield Problem("distill.teacher_cache", f"distill.mode {settings.mode} keeps no probabilities", "leave it out, or set distill.mode to cached", settings.teacher_cache)
    if settings.mode == "model" and settings.teacher_parallel is not None:
        yield Problem("distill.teacher_parallel", "a teacher in memory stands on the student's grid", "leave it out, or set distill.mode to cached")
    if settings.replay is not None and (data.mixture is not None or data.streaming):
        yield Problem("distill.replay", "it makes a mixture of data.train and itself", "leave out data.mixture and data.streaming, or give a source of kind replay there", settings.replay)
    if train.forgetting_data is not None and (train.eval_interval is None or (data.validation is None and not data.validation_rows)):
        yield Problem("train.forgetting_data", "it is looked at when the run evaluates", "give train.eval_interval, and a validation set", train.forgetting_data)

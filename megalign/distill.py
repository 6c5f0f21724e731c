"""Distillation: a student learns a teacher's distribution over the next token, or imitates the teacher's answers.

    L = sum over scored tokens of D(teacher, student)  +  a * -log p_student(token)   /   scored tokens in the global batch

    D: KL(teacher || student), KL(student || teacher), or the generalised Jensen-Shannon divergence, at distill.temperature

The teacher is a second model in memory (`distill.mode=model`); or its K most probable tokens, kept by one pass on a layout of
its own (`cached`: KL(teacher || student) over them and one bin for the rest); or it answers the prompts of the data, and
the student is fine-tuned on the answers (`sequence`). Hinton et al., arXiv:1503.02531; Kim and Rush, 1606.07947; Agarwal et
al., 2306.13649. Replay of earlier data holds what the student already knew (`distill.replay`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megalign.batch import Batch
from megalign.config.rules import check
from megalign.config.schema import DistillConfig, MixtureSource, Recipe
from megalign.losses import Loss, TokenLoss
from megalign.losses.distill import forward_kl, jensen_shannon, reverse_kl
from megalign.models.base import model_hash
from megalign.models.divergence import Divergence, divergence, top_k_divergence
from megalign.models.resolve import resolve_model
from megalign.parallel.grid import Grid
from megalign.parallel.init import World
from megalign.parallel.vocab import vocab_parallel_logprobs
from megalign.sft import sft
from megalign.trainer.drawn import as_messages, draw, questions, write_lines
from megalign.trainer.engine import Engine
from megalign.trainer.objective import Objective, scored_tokens
from megalign.trainer.session import Algorithm, open_session
from megalign.trainer.teacher import (
    KeptTeacher,
    TeacherModel,
    check_vocabulary_of,
    keep_teacher,
    numbered_datasets,
    teacher_recipe,
    with_tokenizer_of,
)

DIVERGENCES: Mapping[str, Divergence] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl}


def distill(recipe: Recipe, world: World) -> None:
    """Teach the student as the recipe says, on every rank of the world (collective).

    Raises what `sft` raises, ConfigError for a teacher that cannot teach this student, and RunError for a stale folder of a kept one.
    """
    teacher = teacher_recipe(recipe)
    check(teacher, world.size)
    if recipe.distill.mode == "sequence":
        sft(with_replay(with_answers_of(recipe, teacher, world)), world)
        return
    recipe = with_replay(with_tokenizer_of(recipe, teacher))
    settings, folder = recipe.distill, Path(recipe.distill.teacher_cache or Path(recipe.output) / "teacher")
    taught_by, notes = model_hash(teacher), []
    if settings.mode == "cached":
        resolved = resolve_model(recipe)
        train, validation = numbered_datasets(resolved)
        sets = {"train": train, "validation": validation}
        made_from = {"teacher": taught_by, "tokenizer": sets["train"].tokenizer.hash, "template": sets["train"].tokenizer.template.hash, "precision": recipe.train.precision}
        teacher.data = resolved.data
        notes.append(("teacher", keep_teacher(teacher, world, sets, folder, made_from)))

    session = open_session(recipe, world, build=numbered_datasets, identity=lambda r: {"teacher": taught_by})
    recipe, grid = session.recipe, session.grid
    check_vocabulary_of(teacher, session.vocab_size)
    engine = Engine(recipe, grid, session.vocab_size)
    if settings.mode == "cached":
        kept = KeptTeacher(folder, (session.train, session.validation), grid)
        head, prepare = top_k_head(kept, settings, grid, session.vocab_size), None
    else:
        model = TeacherModel(teacher, grid, session.vocab_size)
        head, prepare = full_head(model, settings, grid, session.vocab_size), model.prepare
    objective = Objective(partial(distillation_loss, ce_weight=settings.ce_weight), count=taught_tokens, predict_ahead=False, prepare=prepare, head=head)
    session.carry_out(engine, Algorithm(objective, notes=notes))


def full_head(teacher: TeacherModel, settings: DistillConfig, grid: Grid, vocab_size: int) -> Callable[[Tensor, Tensor, Tensor, Batch], Tensor]:
    """What the student's last stage returns: [1, N] divergences, or [3, N] with log p of the token and whether it is the most probable."""
    of: Divergence = partial(jensen_shannon, beta=settings.beta) if settings.loss == "jensen_shannon" else DIVERGENCES[settings.loss]

    def head(hidden_ND: Tensor, weight_vD: Tensor, targets_N: Tensor, batch: Batch) -> Tensor:
        says = teacher.says(batch)
        found = divergence(hidden_ND, weight_vD, *says, grid.tensor.group, vocab_size, of, temperature=settings.temperature)
        return with_tokens(found, hidden_ND, weight_vD, targets_N, settings, grid, vocab_size)

    return head


def top_k_head(teacher: KeptTeacher, settings: DistillConfig, grid: Grid, vocab_size: int) -> Callable[[Tensor, Tensor, Tensor, Batch], Tensor]:
    """The same from a kept teacher."""

    def head(hidden_ND: Tensor, weight_vD: Tensor, targets_N: Tensor, batch: Batch) -> Tensor:
        ids, logprobs = (x.to(hidden_ND.device) for x in teacher.says(batch))
        found = top_k_divergence(hidden_ND, weight_vD, ids, logprobs, grid.tensor.group, vocab_size, temperature=settings.temperature)
        return with_tokens(found, hidden_ND, weight_vD, targets_N, settings, grid, vocab_size)

    return head


def with_tokens(found_N: Tensor, hidden_ND: Tensor, weight_vD: Tensor, targets_N: Tensor, settings: DistillConfig, grid: Grid, vocab_size: int) -> Tensor:
    """The divergences, and where the data's own tokens count too, their log-probabilities."""
    if not settings.ce_weight:
        return found_N[None]
    logprobs, correct = vocab_parallel_logprobs(hidden_ND, weight_vD, targets_N, grid.tensor.group, vocab_size)
    return torch.stack([found_N, logprobs, correct.float()])


def distillation_loss(output: Tensor, batch: Batch, *, ce_weight: float) -> Loss:
    """Divergence of the scored tokens, and `ce_weight` times the cross-entropy of the data's own."""
    found = TokenLoss(output[0].sum(), output[0].numel(), {"divergence": output[0].detach().sum()})
    if not ce_weight:
        return found
    metrics = {**found.metrics, "cross_entropy": -output[1].detach().sum(), "mean_token_accuracy": output[2].detach().sum()}
    return replace(found, sum=found.sum - ce_weight * output[1].sum(), metrics=metrics)


def taught_tokens(batch: Batch) -> float:
    """Scored tokens of a microbatch. (Not `scored_tokens` itself: what that divides is called a cross-entropy, and has a perplexity.)"""
    return scored_tokens(batch)


def with_replay(recipe: Recipe) -> Recipe:
    """`distill.replay_share` of the tokens from `distill.replay`, the rest from data.train, as a mixture."""
    settings = recipe.distill
    if settings.replay is None:
        return recipe
    changed = recipe.model_copy(deep=True)
    sources = [("new", recipe.data.train, 1 - settings.replay_share, None), ("replay", settings.replay, settings.replay_share, "replay")]
    changed.data.train = type(changed.data)().train  # a mixture takes its place
    changed.distill.replay = None  # it is said in the mixture
    changed.data.mixture = [MixtureSource(name=name, path=path, weight=weight, kind=kind) for name, path, weight, kind in sources]  # pyright: ignore[reportArgumentType]
    return changed


def with_answers_of(recipe: Recipe, teacher: Recipe, world: World) -> Recipe:
    """The recipe with the teacher's answers to the prompts of data.train in its place (collective)."""
    folder = Path(recipe.output)
    rows, held_out = questions(teacher, recipe.distill.samples.prompts)
    drawn = draw(teacher, world, rows, recipe.distill.samples, folder / "teacher" / "drawn.jsonl", seed=recipe.train.seed)
    answers = [
        {"messages": [*as_messages(entry.row.messages[:-1]), {"role": "assistant", "content": answer.text}]}
        for entry in drawn
        for answer in entry.answers
        if answer.finished
    ]
    files = folder / "teacher" / "answers.jsonl", folder / "teacher" / "held_out.jsonl"
    write_lines(files[0], answers, world)
    write_lines(files[1], [{"messages": as_messages(row.messages)} for row in held_out], world)
    changed = recipe.model_copy(deep=True)
    changed.data.train, changed.data.max_rows, changed.data.format, changed.data.loss_on = str(files[0]), None, "auto", "completion"
    changed.data.validation, changed.data.validation_rows = (str(files[1]), recipe.data.validation_rows) if held_out else (None, 0)
    return changed

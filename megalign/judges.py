"""Who scores drawn answers: a function of row and answer, or trained reward models.

One reward model: its reward, normalised where the checkpoint knows how. Several (an ensemble):
    score(x, y) = mean over m of r_m(x, y)  -  alpha * std over m of r_m(x, y),   r_m normalised, std of these models (ddof 0)
so that an answer on which the models disagree counts less (arXiv:2310.02743). Answers are scored as text: a reward model
renders and tokenises each dialogue as in its own training, whatever the policy's tokenizer is.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from megalign.config.errors import ConfigError, Problem, shown
from megalign.config.rules import check
from megalign.config.schema import Recipe, RewardJudgeConfig, ScoredConfig
from megalign.data.rows import BadRow, Conversation, DataError, Message
from megalign.parallel.checkpoint import CheckpointError, read_meta
from megalign.parallel.grid import destroy_grid
from megalign.parallel.init import World
from megalign.rewards.ensemble import pessimistic
from megalign.scoring import RewardScorer, kept_normalisation
from megalign.serving import find_checkpoint, recipe_for, stored_tokenizer
from megalign.trainer.drawn import Judge, function_judge

REWARD_MODEL = "reward_model"


def judge_of(settings: ScoredConfig, section: str, recipe: Recipe, world: World) -> Judge:
    """Who `section`.scorer says. section: best_of_n, rso, ...: errors name its keys. recipe: the policy's, for its layout.

    Everything that can be known before answers are drawn is. Raises ConfigError for a scorer that is none, a checkpoint of
    another kind, a head that it has not, a layout it cannot run on; CheckpointError for one that is not what it was.
    """
    if settings.scorer != REWARD_MODEL:
        return function_judge(settings.scorer, world, f"{section}.scorer")
    asked, field = settings.reward_model, f"{section}.reward_model"
    paths = [asked.checkpoints] if isinstance(asked.checkpoints, str) else list(asked.checkpoints or [])
    checkpoints = [_checkpoint(path, field) for path in paths]
    heads = [_head(checkpoint, asked.head, field) for checkpoint in checkpoints]
    overrides = _overrides(asked, recipe)
    for checkpoint, head in zip(checkpoints, heads):
        _check_layout(checkpoint, overrides, field, world)
        stored_tokenizer(checkpoint)
        if len(checkpoints) > 1 and kept_normalisation(checkpoint).get(head) is None:
            rule = f"{checkpoint} has no normalisation of head {head!r}, and the members of an ensemble agree on no scale without"
            raise ConfigError([Problem(f"{field}.checkpoints", rule, "give runs that ended, or the checkpoints that they ended with")])

    def score(rows: Sequence[Conversation], answers: Sequence[Sequence[str]]) -> list[list[float]]:
        said = [_said(row, text) for row, texts in zip(rows, answers, strict=True) for text in texts]
        members = [_rewards(checkpoint, head, said, overrides, world, field) for checkpoint, head in zip(checkpoints, heads)]
        total = pessimistic(np.stack(members), alpha=asked.alpha) if len(members) > 1 else members[0]
        ends = np.cumsum([len(texts) for texts in answers])
        return [part.tolist() for part in np.split(total, ends[:-1])] if len(ends) else []

    models = [hashlib.sha256((checkpoint / "manifest.json").read_bytes()).hexdigest() for checkpoint in checkpoints]
    return Judge({"name": REWARD_MODEL, "models": models, "heads": heads, "alpha": asked.alpha if len(models) > 1 else None}, score)


def _said(row: Conversation, text: str) -> Conversation:
    """The dialogue that ends with an answer in the place of the reference."""
    return replace(row, messages=(*row.messages[:-1], Message("assistant", text)))


def _rewards(checkpoint: Path, head: str, said: Sequence[Conversation], overrides: list[str], world: World, field: str) -> np.ndarray:
    """[N] of each dialogue by one model, which is loaded for it and goes again (collective). Raises DataError for what it cannot read."""
    try:
        scorer = RewardScorer.load(checkpoint, overrides, world)
        rewards = scorer.score(said)[head]
        for number in np.flatnonzero(np.isnan(rewards))[:1]:
            (reason,) = (each.reason for each in scorer.encode([said[number]]) if isinstance(each, BadRow))
            where = f"an answer to {said[number].source}:{said[number].line}"
            raise DataError(f"{field}: {checkpoint} cannot score {where}: {reason}; raise {field}.max_tokens, or lower {field.partition('.')[0]}.max_new_tokens")
        return scorer.normalised(head, rewards) if scorer.normalisation[head] else rewards
    finally:
        scorer = None
        gc.collect()
        destroy_grid()


def _checkpoint(path: str, field: str) -> Path:
    """Of a run or a checkpoint folder; ConfigError for anything but a reward model."""
    fix = "give a run of megalign rm train, or one of its checkpoints (a Hugging Face folder can be model.init_from of one)"
    try:
        found = find_checkpoint(Path(path))
    except CheckpointError:
        raise ConfigError([Problem(f"{field}.checkpoints", f"{path} holds no complete checkpoint of ours", fix, path)]) from None
    if not read_meta(found)["identity"].get("heads"):
        raise ConfigError([Problem(f"{field}.checkpoints", f"{found} says words, and gives no rewards: megalign rm train did not train it", fix, path)])
    return found


def _head(checkpoint: Path, asked: str | None, field: str) -> str:
    """The head that scores."""
    names = list(read_meta(checkpoint)["identity"]["heads"])
    if asked in names or (asked is None and len(names) == 1):
        return asked or names[0]
    rule = f"{checkpoint} has the heads {', '.join(names)}"
    raise ConfigError([Problem(f"{field}.head", rule, "name one of them", asked)])


def _overrides(asked: RewardJudgeConfig, recipe: Recipe) -> list[str]:
    """Of the reward model's own recipe."""
    sizes = (asked.parallel or recipe.parallel).model_dump(exclude_defaults=True)
    length = [] if asked.max_tokens is None else [f"data.sequence_length={asked.max_tokens}"]
    return [f"parallel.{key}={shown(value)}" for key, value in sizes.items()] + length


def _check_layout(checkpoint: Path, overrides: list[str], field: str, world: World) -> None:
    """Raise ConfigError where the reward model cannot run on it, with this recipe's names of the keys."""
    own = recipe_for(checkpoint, overrides)
    own.train.global_batch_size = world.size  # a rule of training, without meaning here
    try:
        check(own, world.size)
    except ConfigError as error:
        problems = [replace(problem, field=_renamed(problem.field, field)) for problem in error.problems]
        raise ConfigError(problems, f"the recipe, of the reward model {checkpoint}") from None


def _renamed(key: str, field: str) -> str:
    if key == "data.sequence_length":
        return f"{field}.max_tokens"
    return f"{field}.{key}" if key.startswith("parallel") else key

"""Statistical rejection sampling (RSO): pairs for DPO from answers distributed as the policy that DPO looks for.

    accept y ~ pi with probability exp((score(x, y) - M) / beta)   ->   y ~ pi(y|x) exp(score(x, y) / beta) / Z(x)

DPO's loss assumes pairs drawn from the optimal policy; pairs of pi itself, or of another model, are not. Accepted answers
are put together two by two, the higher score is chosen. Liu et al., arXiv:2309.06657, section 3.3 and algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megalign.config.errors import ConfigError, Problem
from megalign.config.load import dump_recipe
from megalign.config.rules import check
from megalign.config.schema import Recipe, RSOConfig
from megalign.data.rows import DataError
from megalign.judges import judge_of
from megalign.models.resolve import resolve_model
from megalign.parallel.init import World
from megalign.rewards.selection import pairs_of, rejection_sample
from megalign.trainer.drawn import Drawn, as_messages, draw, open_output, questions, write_lines


def rso(recipe: Recipe, world: World) -> None:
    """Write `output`/pairs.jsonl, which `megalign dpo data.train=` reads, on every rank of the world (collective).

    Raises ConfigError or DataError, and RunError where answers in `output` were drawn by another recipe.
    """
    settings, output = recipe.rso, Path(recipe.output)
    check(resolve_model(recipe), world.size)
    if recipe.model.init_from is None:
        raise ConfigError([Problem("model.init_from", "rso chooses among the answers of a trained model", "give a Hugging Face folder, or a run of ours", None)])
    judge = judge_of(settings, "rso", resolve_model(recipe), world)
    open_output(output, world, "drawn.jsonl")
    rows, _ = questions(resolve_model(recipe), settings.prompts)
    drawn = draw(recipe, world, rows, settings, output / "drawn.jsonl", seed=recipe.train.seed, judge=judge)
    pairs, facts = sampled_pairs(drawn, settings, recipe.train.seed)
    if not pairs:
        raise DataError(f"no pair is left of {len(rows)} prompts: fewer than two finished answers were accepted, or all scores tie; raise rso.n or rso.beta")
    write_lines(output / "pairs.jsonl", pairs, world)
    if world.rank == 0:
        (output / "recipe.yaml").write_text(dump_recipe(recipe))
        print(f"{output / 'pairs.jsonl'}: {len(pairs)} pairs of {facts['prompts']} of {len(rows)} prompts; {facts['accepted']:.1%} of the answers were accepted, mean score {facts['score']:.4g} (all: {facts['score_of_all']:.4g})")


def sampled_pairs(drawn: Sequence[Drawn], settings: RSOConfig, seed: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Pairs of accepted answers, and what is said of them. The same seed accepts the same answers."""
    numbers, pairs = np.random.default_rng(seed), []
    offered, taken, scores, prompts = 0, 0, [], 0
    for entry in drawn:
        finished = [i for i, answer in enumerate(entry.answers) if answer.finished]
        if len(finished) < 2:
            continue
        rewards = np.array([entry.scores[i] for i in finished])
        accepted = np.flatnonzero(rejection_sample(rewards, numbers.random(len(rewards)), beta=settings.beta))
        offered, taken, scores = offered + len(finished), taken + len(accepted), [*scores, *rewards[accepted]]
        # Answers came in random order, so the first so many are as good as any.
        used = [finished[i] for i in accepted[: settings.accepted]]
        found = pairs_of(np.array([entry.scores[i] for i in used]))
        prompts += bool(found)
        for chosen, rejected in ((used[a], used[b]) for a, b in found):
            pairs.append(
                {
                    "prompt": as_messages(entry.row.messages[:-1]),
                    "chosen": entry.answers[chosen].text,
                    "rejected": entry.answers[rejected].text,
                    "score_chosen": entry.scores[chosen],
                    "score_rejected": entry.scores[rejected],
                }
            )
    everything = [score for entry in drawn for score in entry.scores]
    facts = {"prompts": prompts, "accepted": taken / max(offered, 1), "score": float(np.mean(scores or [0.0])), "score_of_all": float(np.mean(everything or [0.0]))}
    return pairs, facts

"""DPO in rounds: the policy draws its own pairs, learns from them, and becomes the reference of the next round.

    y_1 ... y_n ~ pi_k;   (best, worst) by score(x, y);   pi_{k+1} = DPO(pi_k on these pairs, reference pi_k)

Pairs are on-policy: a round learns from answers of the policy it starts from and of no other (what was drawn is kept under that
model's hash), and compares with it. Every round is a run of `dpo` in a folder of its own; a repeated command goes on where it
was. Iterative DPO: arXiv:2312.16682, 2404.19733; on-policy pairs and new anchors: 2405.07863.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megalign.best_of_n import mean_score, record, sample, seed_of
from megalign.config.errors import ConfigError, Problem
from megalign.config.load import dump_recipe
from megalign.config.rules import check
from megalign.config.schema import Recipe, RoundsConfig
from megalign.data.rows import Conversation, DataError
from megalign.dpo import dpo
from megalign.judges import judge_of
from megalign.models.resolve import resolve_model
from megalign.parallel.grid import destroy_grid
from megalign.parallel.init import World
from megalign.report.build import build_report
from megalign.sweep import is_finished
from megalign.trainer.drawn import Drawn, as_messages, draw, open_output, questions, write_lines


def dpo_rounds(recipe: Recipe, world: World) -> None:
    """Run the rounds of the recipe, on every rank of the world (collective).

    Raises what `dpo` raises, and RunError where answers in `output` were drawn by another model or recipe.
    """
    settings, output, count = recipe.rounds, Path(recipe.output), recipe.rounds.count or 0
    check(resolve_model(recipe), world.size)
    if recipe.model.init_from is None:
        rule = "rounds begin with the answers of a trained model"
        raise ConfigError([Problem("model.init_from", rule, "give a Hugging Face folder, or a run of ours", None)])
    judge = judge_of(settings, "rounds", resolve_model(recipe), world)
    open_output(output, world, "round_1")
    rows, held_out = questions(resolve_model(recipe), None)
    draw(recipe, world, asked(rows, settings.prompts, 1), settings, output / "round_1" / "drawn.jsonl", seed=seed_of(recipe, 1), judge=judge)  # refuses what another recipe drew, before anything is written
    if world.rank == 0:
        (output / "recipe.yaml").write_text(dump_recipe(recipe))

    policy, after = recipe, []
    with record(output, count, world) as log:
        for number in range(1, count + 1):
            folder, seed = output / f"round_{number}", seed_of(recipe, number)
            drawn = draw(policy, world, asked(rows, settings.prompts, number), settings, folder / "drawn.jsonl", seed=seed, judge=judge)
            before = draw(policy, world, held_out, settings, folder / "held_out.jsonl", seed=seed, judge=judge, greedy=True)
            pairs = ranked(drawn)
            if not pairs:
                raise DataError(f"round {number}: no pair is left: of each prompt's answers that ended within rounds.max_new_tokens({settings.max_new_tokens}) none scores above another")
            write_lines(folder / "pairs.jsonl", pairs, world)
            log.train(number - 1, **(facts := of_round(drawn, before, pairs)))
            if world.rank == 0:
                print(f"round {number} of {count}: {', '.join(f'{name} {value:.4g}' for name, value in facts.items())}", flush=True)
            dpo(training(policy, folder), world)
            destroy_grid()
            if not is_finished(folder / "run"):  # train.stop_at_step: a later command goes on in the middle of it
                log.event(number - 1, "stopped", f"in round {number}, at train.stop_at_step({recipe.train.stop_at_step}); repeat the command without it")
                return
            policy = recipe.model_copy(deep=True)
            policy.model.init_from = str(folder / "run")
        after = draw(policy, world, held_out, settings, output / f"round_{count}" / "held_out_after.jsonl", seed=recipe.train.seed, judge=judge, greedy=True)
        log.train(count, **{"score/held_out": mean_score(after)} if after else {})
        log.event(count, "finished", f"the policy is {policy.model.init_from}")
    write_lines(output / "samples.jsonl", [sample(entry, count) for entry in after[: recipe.train.sample_prompts]], world)
    if world.rank == 0 and recipe.logging.report:
        build_report(output)


def asked(rows: Sequence[Conversation], prompts: int | None, number: int) -> list[Conversation]:
    """The prompts of a round: the next so many, from the first again at the end; all where `prompts` is None."""
    count = len(rows) if prompts is None else min(prompts, len(rows))
    start = (number - 1) * count
    return [rows[(start + i) % len(rows)] for i in range(count)]


def ranked(drawn: Sequence[Drawn]) -> list[dict[str, Any]]:
    """The best and the worst finished answer to each prompt; a tie teaches nothing."""
    pairs = []
    for entry in drawn:
        finished = [i for i, answer in enumerate(entry.answers) if answer.finished and answer.text]
        scores = np.array([entry.scores[i] for i in finished])
        if not len(scores) or scores.max() == scores.min():
            continue
        best, worst = finished[int(scores.argmax())], finished[int(scores.argmin())]
        answers = {side: entry.answers[i].text for side, i in (("chosen", best), ("rejected", worst))}
        pairs.append({"prompt": as_messages(entry.row.messages[:-1]), **answers, "score_chosen": entry.scores[best], "score_rejected": entry.scores[worst]})
    return pairs


def of_round(drawn: Sequence[Drawn], before: Sequence[Drawn], pairs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What is logged of the policy that enters a round."""
    finished = [answer.finished for entry in drawn for answer in entry.answers]
    found = {"score/mean": mean_score(drawn), "pairs": len(pairs), "finished": float(np.mean(finished))}
    return {**found, **({"score/held_out": mean_score(before)} if before else {})}


def training(policy: Recipe, folder: Path) -> Recipe:
    """The recipe of a round's training on its own pairs; the reference is what `policy` starts from."""
    recipe = policy.model_copy(deep=True)
    recipe.output, recipe.name, recipe.rounds = str(folder / "run"), f"{recipe.name}, {folder.name}", RoundsConfig()
    recipe.data.train, recipe.data.mixture, recipe.data.curriculum, recipe.data.streaming = str(folder / "pairs.jsonl"), None, None, False
    recipe.data.format, recipe.data.max_rows, recipe.data.validation, recipe.data.validation_rows = "preference", None, None, 0
    recipe.data.cache_dir = recipe.data.cache_dir or str(folder.parent / ".cache")
    return recipe

"""Best-of-n fine-tuning (rejection sampling): draw n answers to each prompt, keep the best, imitate it; and again.

    y* = argmax over y_1 ... y_n ~ pi of score(x, y);   pi <- SFT on (x, y*)

A round moves the policy by at most log n - (n - 1)/n nats (n = 16: 1.835). Every round is a run of `sft` in a folder of its
own, started from the round before; its answers are drawn once and kept in a file, so that a repeated command goes on
where it was. Also known as RAFT (arXiv:2304.06767); bound: arXiv:2401.01879.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megalign.config.errors import ConfigError, Problem
from megalign.config.load import dump_recipe
from megalign.config.rules import check
from megalign.config.schema import Recipe
from megalign.data.rows import DataError
from megalign.judges import judge_of
from megalign.models.resolve import resolve_model
from megalign.parallel.grid import destroy_grid
from megalign.parallel.init import World
from megalign.report.build import build_report
from megalign.rewards.overoptimisation import best_of_n_kl
from megalign.rewards.selection import best
from megalign.sft import sft
from megalign.trainer.drawn import Drawn, as_messages, draw, open_output, questions, write_lines
from megalign.trainer.metrics import MetricsLogger, NullLogger


def best_of_n(recipe: Recipe, world: World) -> None:
    """Run the rounds of the recipe, on every rank of the world (collective).

    Raises what `sft` raises, and RunError where answers in `output` were drawn by another recipe.
    """
    settings, output = recipe.best_of_n, Path(recipe.output)
    check(resolve_model(recipe), world.size)
    if recipe.model.init_from is None:
        rule = "best-of-n chooses among the answers of a trained model"
        raise ConfigError([Problem("model.init_from", rule, "give a Hugging Face folder, or a run of ours", None)])
    judge = judge_of(settings, "best_of_n", resolve_model(recipe), world)
    open_output(output, world, "round_1")
    rows, held_out = questions(resolve_model(recipe), settings.prompts)
    draw(recipe, world, rows, settings, output / "round_1" / "drawn.jsonl", seed=seed_of(recipe, 1), judge=judge)  # refuses what another recipe drew, before anything is written
    write_lines(output / "held_out.jsonl", [{"messages": as_messages(row.messages)} for row in held_out], world)
    if world.rank == 0:
        (output / "recipe.yaml").write_text(dump_recipe(recipe))

    policy, drawn = recipe, []
    with record(output, settings.rounds, world) as log:
        for number in range(1, settings.rounds + 1):
            folder, seed = output / f"round_{number}", seed_of(recipe, number)
            drawn = draw(policy, world, rows, settings, folder / "drawn.jsonl", seed=seed, judge=judge)
            before = draw(policy, world, held_out, settings, folder / "held_out.jsonl", seed=seed, judge=judge, greedy=True)
            chosen = kept(drawn, settings.min_score)
            if not chosen:
                raise DataError(f"round {number}: no answer is left to imitate: all are below best_of_n.min_score({settings.min_score}) or cut at best_of_n.max_new_tokens({settings.max_new_tokens})")
            write_lines(folder / "chosen.jsonl", [{"messages": line["messages"]} for line in chosen], world)
            log.train(number - 1, **(facts := of_round(drawn, before, chosen, settings.n)))
            if world.rank == 0:
                print(f"round {number} of {settings.rounds}: {', '.join(f'{name} {value:.4g}' for name, value in facts.items())}", flush=True)
            sft(imitation(policy, folder, output / "held_out.jsonl" if held_out else None), world)
            destroy_grid()
            policy = recipe.model_copy(deep=True)
            policy.model.init_from = str(folder / "run")
        last = output / f"round_{settings.rounds}"
        after = draw(policy, world, held_out, settings, last / "held_out_after.jsonl", seed=recipe.train.seed, judge=judge, greedy=True)
        log.train(settings.rounds, **{"score/held_out": mean_score(after)} if after else {})
        log.event(settings.rounds, "finished", f"the policy is {policy.model.init_from}")
    write_lines(output / "samples.jsonl", [sample(entry, settings.rounds) for entry in (after or drawn)[: recipe.train.sample_prompts]], world)
    if world.rank == 0 and recipe.logging.report:
        build_report(output)


def seed_of(recipe: Recipe, number: int) -> int:
    """Of a round's answers."""
    return recipe.train.seed + 1_000_003 * number


def kept(drawn: Sequence[Drawn], min_score: float | None) -> list[dict[str, Any]]:
    """The best finished answer to each prompt, unless it scores too low."""
    chosen = []
    for entry in drawn:
        finished = [i for i, answer in enumerate(entry.answers) if answer.finished]
        if not finished:
            continue
        winner = finished[best(np.array([entry.scores[i] for i in finished]))]
        if min_score is None or entry.scores[winner] >= min_score:
            answer = {"role": "assistant", "content": entry.answers[winner].text}
            chosen.append({"messages": [*as_messages(entry.row.messages[:-1]), answer], "score": entry.scores[winner]})
    return chosen


def of_round(drawn: Sequence[Drawn], before: Sequence[Drawn], chosen: Sequence[dict[str, Any]], n: int) -> dict[str, float]:
    """What is logged of the policy that enters a round."""
    found = {"score/mean": mean_score(drawn), "score/best_of_n": float(np.mean([line["score"] for line in chosen])), "chosen": len(chosen), "kl_bound": best_of_n_kl(n)}
    finished = [answer.finished for entry in drawn for answer in entry.answers]
    return {**found, "finished": float(np.mean(finished)), **({"score/held_out": mean_score(before)} if before else {})}


def mean_score(drawn: Sequence[Drawn]) -> float:
    """Of all answers."""
    return float(np.mean([score for entry in drawn for score in entry.scores]))


def imitation(policy: Recipe, folder: Path, validation: Path | None) -> Recipe:
    """The recipe of a round's fine-tuning: the last turn alone is scored, for earlier ones were not chosen."""
    recipe = policy.model_copy(deep=True)
    recipe.output, recipe.name = str(folder / "run"), f"{recipe.name}, {folder.name}"
    recipe.data.train, recipe.data.mixture, recipe.data.curriculum, recipe.data.streaming = str(folder / "chosen.jsonl"), None, None, False
    recipe.data.format, recipe.data.loss_on, recipe.data.max_rows = "messages", "completion", None
    recipe.data.validation, recipe.data.validation_rows = (str(validation), recipe.data.validation_rows) if validation else (None, 0)
    recipe.data.cache_dir = recipe.data.cache_dir or str(folder.parent / ".cache")
    return recipe


def record(output: Path, rounds: int, world: World) -> NullLogger:
    """metrics.jsonl of the rounds: step r is the policy after r of them. Written anew each time: what was drawn is read again."""
    return NullLogger() if world.rank else MetricsLogger(output, total_steps=rounds, quiet=True, tensorboard=False)


def sample(entry: Drawn, step: int) -> dict[str, Any]:
    """A line of samples.jsonl."""
    return {"step": step, "prompt": as_messages(entry.row.messages[:-1]), "response": entry.answers[0].text, "reference": entry.row.messages[-1].content}



"""Answers that a policy draws and a judge scores, kept in a file: drawn once, found again by a repeated command."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from megalign.config.schema import Recipe, SamplingConfig
from megalign.data.dataset import tokenizer_of
from megalign.data.rows import Conversation, Message
from megalign.data.splits import read_splits
from megalign.models.base import model_hash
from megalign.models.resolve import resolve_model
from megalign.parallel.grid import destroy_grid
from megalign.parallel.init import World
from megalign.rewards.verifiers import load_scorer, score_of
from megalign.rollout.candidates import Candidate, candidates
from megalign.rollout.sampler import SamplingParams
from megalign.trainer.engine import Engine
from megalign.trainer.run import RunError, grid_of

T = TypeVar("T")


@dataclass(frozen=True)
class Drawn:
    """A prompt (with its reference as last message), its answers and their scores, in the order in which they were drawn."""

    row: Conversation
    answers: list[Candidate]
    scores: list[float]


@dataclass(frozen=True)
class Judge:
    """Who scores answers. `megalign/judges.py` makes them of a recipe."""

    identity: dict[str, Any]  # kept with the scores: those of another judge are not taken for its own
    score: Callable[[Sequence[Conversation], Sequence[Sequence[str]]], list[list[float]]]  # rows, and the texts of the answers to each (collective)


def questions(recipe: Recipe, count: int | None) -> tuple[list[Conversation], list[Conversation]]:
    """The training and the held-out conversations, each up to its last assistant turn; those with tools are left out."""
    train, held_out = (
        [_up_to_answer(row) for row in split.rows if isinstance(row, Conversation) and not row.tools] for split in read_splits(recipe)
    )
    return train[:count], held_out


def draw(
    recipe: Recipe, world: World, rows: Sequence[Conversation], settings: SamplingConfig, file: Path, *, seed: int, judge: Judge | None = None, greedy: bool = False
) -> list[Drawn]:
    """settings.n answers to each prompt (greedy: the most probable one) by the model of model.init_from, scored (collective).

    judge: who scores; None: nobody, and all scores are 0.
    Read from `file` where it exists. Raises RunError where that was made by another model, scorer, sampling or set of prompts.
    """
    resolved = resolve_model(recipe)
    key = {
        "model": model_hash(resolved),
        "prompts": hashlib.sha256(json.dumps([asdict(row) for row in rows]).encode()).hexdigest(),
        "sampling": settings.model_dump(mode="json", include=set(SamplingConfig.model_fields)),
        "scorer": judge and judge.identity,
        "greedy": greedy,
        "seed": seed,
    }
    dist.barrier()  # nobody looks before everybody is here: rank 0 may write soon
    if not file.exists():
        drawn = _draw(resolved, world, rows, settings, seed, greedy)
        texts = [[answer.text for answer in answers] for answers in drawn]
        scores = judge.score(rows, texts) if judge else [[0.0] * len(answers) for answers in drawn]
        lines = [
            {"prompt": as_messages(row.messages[:-1]), "reference": row.messages[-1].content, "answers": [asdict(answer) for answer in answers], "scores": given}
            for row, answers, given in zip(rows, drawn, scores, strict=True)
        ]
        on_first_rank(lambda: _lines(file, [key, *lines]), world)
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    if lines[0] != key:
        changed = ", ".join(name for name in key if lines[0].get(name) != key[name])
        raise RunError(f"{file} was drawn with another {changed}; restore the recipe, or choose another output")
    return [
        Drawn(row, [Candidate(**answer) for answer in line["answers"]], line["scores"]) for row, line in zip(rows, lines[1:], strict=True)
    ]


def function_judge(name: str, world: World, key: str = "scorer") -> Judge:
    """A built-in scorer or a function of the user's, asked on rank 0 alone: it may cost money, or be a server.

    key: field that errors name. Raises ConfigError where there is no such function; scoring raises what the function raises.
    """
    scorer = load_scorer(name, key)

    def score(rows: Sequence[Conversation], answers: Sequence[Sequence[str]]) -> list[list[float]]:
        return on_first_rank(lambda: [[score_of(scorer, row, text, name) for text in texts] for row, texts in zip(rows, answers, strict=True)], world)

    return Judge({"name": name}, score)


def open_output(output: Path, world: World, mark: str) -> None:
    """Raise RunError, on every rank, for a folder that holds something and has no `mark` of ours (collective)."""
    names = sorted(entry.name for entry in output.iterdir() if not entry.name.endswith(".partial")) if output.is_dir() else []
    dist.barrier()  # everybody has looked before anybody writes
    if names and mark not in names:
        raise RunError(f"output: {output} is not empty ({', '.join(names[:3])} ...) and holds no {mark}; choose another folder")


def as_messages(messages: Sequence[Message]) -> list[dict[str, str]]:
    """A dialogue as JSON."""
    return [{"role": message.role, "content": message.content} for message in messages]


def write_lines(file: Path, rows: Sequence[dict[str, Any]], world: World) -> None:
    """A file of JSON lines, complete, by rank 0; every rank finds it when this returns (collective)."""
    if world.rank == 0:
        _lines(file, rows)
    dist.barrier()


def on_first_rank(work: Callable[[], T], world: World) -> T:
    """What `work` returns on rank 0; what it raises there is raised on every rank (collective)."""
    found: list[Any] = [None, None]
    if world.rank == 0:
        try:
            found[0] = work()
        except Exception as error:
            found[1] = error
    dist.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise found[1]
    return found[0]


def _lines(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    partial.rename(file)


def _up_to_answer(row: Conversation) -> Conversation:
    last = max(i for i, message in enumerate(row.messages) if message.role == "assistant")
    return replace(row, messages=row.messages[: last + 1])


def _draw(recipe: Recipe, world: World, rows: Sequence[Conversation], settings: SamplingConfig, seed: int, greedy: bool) -> list[list[Candidate]]:
    tokenizer = tokenizer_of(recipe)
    grid = grid_of(recipe, world)
    engine = Engine(recipe, grid, recipe.model.vocab_size or tokenizer.vocab_size, train=False)
    try:
        return candidates(
            engine.models,
            grid,
            tokenizer,
            [row.messages[:-1] for row in rows],
            1 if greedy else settings.n,
            max_new_tokens=settings.max_new_tokens,
            sampling=SamplingParams(temperature=0.0) if greedy else SamplingParams(settings.temperature, 0, settings.top_p),
            seed=seed,
            template=recipe.data.template,
        )
    finally:
        del engine
        gc.collect()
        destroy_grid()

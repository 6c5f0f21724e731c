"""Some judged answers with the rewards that the trained policy gives them, for the report."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megalign.batch import Batch
from megalign.data.answers import Wanted
from megalign.data.dataset import Dataset
from megalign.data.pairs import KeptPairs
from megalign.data.rows import Message
from megalign.models.sequences import sequence_logprobs, sequence_tokens
from megalign.parallel.init import device
from megalign.parallel.schedule import from_last_stage
from megalign.trainer.batches import Batches
from megalign.trainer.engine import Engine
from megalign.trainer.reference import REF_LOGPROB
from megalign.trainer.run import RunFolder


def write_sample_pairs(
    engine: Engine, run: RunFolder, dataset: Dataset, prepare: Callable[[Sequence[Batch]], None] | None, beta: float, step: int
) -> None:
    """Add the first `train.sample_prompts` pairs of `dataset` to samples.jsonl (collective).

    Rewards are beta * log pi/pi_ref, without a reference beta * log pi a token.
    """
    rewards = _rewards(engine, dataset, prepare, beta)
    if run.grid.is_logger and rewards:
        assert isinstance(dataset.kept, KeptPairs)
        lines = [
            {"step": step, "prompt": _plain(pair.prompt), "chosen": side(pair.chosen.messages, chosen), "rejected": side(pair.rejected.messages, rejected)}
            for pair, (chosen, rejected) in zip(dataset.kept.pairs(), rewards)
        ]
        _add(run, lines, "chosen")


def write_sample_answers(
    engine: Engine, run: RunFolder, dataset: Dataset, prepare: Callable[[Sequence[Batch]], None] | None, beta: float, step: int
) -> None:
    """Add the first `train.sample_prompts` labelled answers of `dataset` to samples.jsonl, with their rewards (collective)."""
    rewards = _rewards(engine, dataset, prepare, beta)
    if run.grid.is_logger and rewards:
        assert isinstance(dataset.kept, Wanted)
        lines = [
            {"step": step, "prompt": _plain(row.prompt), "judged": {**side(row.response.messages, reward), "desirable": row.label}}
            for row, (reward,) in zip(dataset.kept.judged(), rewards)
        ]
        _add(run, lines, "judged")


def _rewards(engine: Engine, dataset: Dataset, prepare: Callable[[Sequence[Batch]], None] | None, beta: float) -> list[list[float]]:
    """Of each document of the first rows, alike on every rank."""
    grid, recipe = engine.grid, engine.recipe
    count = min(recipe.train.sample_prompts, len(dataset))
    if not count:
        return []
    dealt = Batches(dataset, recipe, grid, evaluation=True)
    batches = [dealt.collate([dataset.rows[number]]) for number in range(count)]
    if prepare is not None:
        prepare(batches)
    rewards = torch.zeros(count, len(dataset.rows[0]), dtype=torch.float64, device=device())
    for number, logprobs in enumerate(engine.score(batches, lambda output, batch: sequence_logprobs(output, batch, grid))):
        values = batches[number].values
        base = values[REF_LOGPROB].to(logprobs.device) if REF_LOGPROB in values else None
        tokens = sequence_tokens(batches[number]).to(logprobs.device)
        rewards[number] = beta * (logprobs.double() / tokens if base is None else logprobs.double() - base)
    return from_last_stage(rewards, grid).tolist()


def _add(run: RunFolder, samples: list[dict[str, Any]], key: str) -> None:
    """In the place of those that have `key`: an end that comes twice says it once."""
    path = run.path / "samples.jsonl"
    others = [line for line in path.read_text().splitlines() if key not in json.loads(line)] if path.exists() else []
    lines = [json.dumps(sample, ensure_ascii=False) for sample in samples]
    path.write_text("".join(line + "\n" for line in [*others, *lines]))


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def side(messages: Sequence[Message], reward: float) -> dict[str, Any]:
    """An answer and its reward."""
    return {"text": "\n".join(message.content for message in messages), "reward": round(reward, 4)}

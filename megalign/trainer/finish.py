"""The end of a run: the best checkpoint, a few answers, exact match, and the summary."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from megalign.chat import answer
from megalign.config.size import Counts
from megalign.data.dataset import Dataset
from megalign.data.rows import Conversation, Message
from megalign.parallel.checkpoint import list_checkpoints
from megalign.rollout.sampler import SamplingParams
from megalign.trainer.engine import Engine
from megalign.trainer.metrics import NullLogger
from megalign.trainer.prune import best_checkpoint
from megalign.trainer.run import RunFolder, prompts_of
from megalign.trainer.training import Progress


def finish(
    engine: Engine,
    run: RunFolder,
    train: Dataset,
    validation: Dataset,
    progress: Progress,
    counts: Counts,
    log: NullLogger,
    seconds: float,
) -> None:
    """Load the best checkpoint, answer held-out prompts, write samples.jsonl and summary.json (collective)."""
    config = run.recipe.train
    final = progress.evaluations[-1][1] if progress.evaluations else None
    best = best_checkpoint(list_checkpoints(run.checkpoints), progress.evaluations)
    loaded = progress.step
    if config.load_best_at_end and best is not None and int(best.name.split("_")[1]) != progress.step:
        engine.load(best, weights_only=True)
        loaded = int(best.name.split("_")[1])
        log.event(progress.step, "best", f"the best checkpoint is {best.name}")
    with engine.averaged() if loaded == progress.step else contextlib.nullcontext():  # what was loaded is averaged already
        exact = answers(engine, run, validation if len(validation.kept) else train, loaded)
    summary = {
        "status": "stopped" if config.stop_at_step == progress.step else "finished",
        "steps": progress.step,
        "final_loss": final,
        "best_eval_loss": progress.best[1] if progress.best else None,
        "best_step": progress.best[0] if progress.best else None,
        "best_checkpoint": best.name if best else None,
        "wall_seconds": round(seconds, 1),
        "tokens": progress.tokens,
        "exact_match": exact,
        "parameters": counts.total,
        "active_parameters": counts.active,
    }
    run.write("summary.json", summary)


def answers(engine: Engine, run: RunFolder, data: Dataset, step: int) -> float | None:
    """Answer prompts greedily and write samples.jsonl; return the share answered exactly, if asked for."""
    config = run.recipe.train
    if engine.heads:  # it says no words
        return None
    replies = reply(engine, run, data, None if config.exact_match else config.sample_prompts)
    if not replies:
        return None
    if run.grid.is_logger:
        with (run.path / "samples.jsonl").open("w") as file:
            for row, response in replies[: max(config.sample_prompts, 3)]:
                line = sample(step, row, response, is_exact(row, response) if config.exact_match else None)
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return sum(is_exact(*pair) for pair in replies) / len(replies) if config.exact_match else None


def generation_metrics(engine: Engine, run: RunFolder, data: Dataset) -> dict[str, float]:
    """`train.eval_prompts` of the data answered greedily: share answered word for word, mean length in characters."""
    replies = reply(engine, run, data, run.recipe.train.eval_prompts)
    if not replies:
        return {}
    exact = sum(is_exact(*pair) for pair in replies) / len(replies)
    return {"exact_match": exact, "response_characters": sum(len(response) for _, response in replies) / len(replies)}


def reply(engine: Engine, run: RunFolder, data: Dataset, count: int | None) -> list[tuple[Conversation, str]]:
    """The first `count` conversations (None: all), each with the model's greedy answer in place of its last turn (collective)."""
    config = run.recipe.train
    rows = prompts_of(data, count)
    if not rows:
        return []
    responses = answer(
        engine.models,
        engine.grid,
        data.tokenizer,
        [list(row.messages[:-1]) for row in rows],
        max_new_tokens=config.sample_tokens,
        sampling=SamplingParams(temperature=0.0),
        seed=config.seed,
    )
    return list(zip(rows, responses, strict=True))


def is_exact(row: Conversation, response: str) -> bool:
    """True if the response is the row's last turn, word for word."""
    return response.strip() == row.messages[-1].content.strip()


def sample(step: int, row: Conversation, response: str, match: bool | None) -> dict[str, Any]:
    """A line of samples.jsonl."""

    def plain(messages: tuple[Message, ...]) -> list[dict[str, str]]:
        return [{"role": message.role, "content": message.content} for message in messages]

    return {"step": step, "prompt": plain(row.messages[:-1]), "response": response, "reference": row.messages[-1].content, "exact_match": match}

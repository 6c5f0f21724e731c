"""A trained reward model at work: answers in, numbers out, on any layout.

`RewardScorer` is what loops use; `score_file` is `megalign rm score`. Dialogues are packed, so a batch of short answers costs
what its tokens cost, and two answers that follow each other are computed on one copy of their prompt (`Batch.prefixes`); each is read
at its last real token, so padding on either side changes nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megalign.batch import Batch, collate, filled_tokens
from megalign.config.schema import HeadConfig
from megalign.data.encode import encode_rows
from megalign.data.formats import detect, read_records
from megalign.data.packing import pack_arrays
from megalign.data.rows import (
    BadRow,
    Conversation,
    DataError,
    Example,
    LabelledResponse,
    Message,
    PreferencePair,
    RankedResponses,
    ScoredResponse,
)
from megalign.data.tokenizer import Tokenizer
from megalign.models.sequences import document_values
from megalign.parallel.checkpoint import CheckpointError, read_meta
from megalign.parallel.grid import destroy_grid
from megalign.parallel.init import World, device
from megalign.parallel.schedule import from_last_stage, sum_over
from megalign.rewards.ensemble import pessimistic, spread
from megalign.rewards.heads import columns_of, reading, shapes_of
from megalign.rewards.normalise import Normalisation
from megalign.serving import load_for_inference, stored_tokenizer
from megalign.trainer.batches import pads_microbatches, shares_prompts
from megalign.trainer.engine import Engine
from megalign.trainer.judged import NORMALISATION

AT_ONCE = 32  # microbatches of one pass through the pipeline
WORTH = 16  # tokens that two documents must have in common at their front: for fewer, a second call of attention costs more than it saves


@dataclass
class RewardScorer:
    """A reward model on this world's layout; every method is collective and gives every rank all results."""

    engine: Engine
    tokenizer: Tokenizer
    heads: Mapping[str, HeadConfig]
    normalisation: Mapping[str, Normalisation | None]  # from the checkpoint; None: its run did not end, or all rewards were equal

    @staticmethod
    def load(path: Path, overrides: Sequence[str], world: World) -> RewardScorer:
        """From a run folder or a checkpoint. overrides: a layout, data.sequence_length.

        Raises CheckpointError where there is none, or one of a model that speaks.
        """
        engine, checkpoint = load_for_inference(path, list(overrides), world, speaks=False)
        if not engine.heads:
            raise CheckpointError(f"{checkpoint} is no reward model: it was not trained by megalign rm train; give a run of that")
        return RewardScorer(engine, stored_tokenizer(checkpoint), engine.recipe.rm.heads, kept_normalisation(checkpoint))

    def score(self, dialogues: Sequence[Conversation]) -> dict[str, np.ndarray]:
        """{head: [N] reading} of each dialogue up to its last message; NaN where it cannot be rendered, or does not fit."""
        examples = list(self.encode(dialogues))
        usable = [number for number, example in enumerate(examples) if isinstance(example, Example)]
        values = self.values([example.input_ids for example in examples if isinstance(example, Example)])
        found = {}
        for name, columns in columns_of(self.heads).items():
            found[name] = np.full(len(examples), np.nan)
            found[name][usable] = reading(self.heads[name], values[:, columns])
        return found

    def normalised(self, name: str, rewards: np.ndarray) -> np.ndarray:
        """Mean 0 and standard deviation 1 on the run's reference samples. Raises CheckpointError where nothing was kept."""
        normalisation = self.normalisation.get(name)
        if normalisation is None:
            raise CheckpointError(f"the checkpoint has no normalisation of head {name!r}: it is kept for the one that the run ended with; give the run folder")
        return normalisation(rewards)

    def encode(self, dialogues: Sequence[Conversation]) -> Iterator[Example | BadRow]:
        """Tokens as in training."""
        data = self.engine.recipe.data
        yield from encode_rows(dialogues, self.tokenizer, "tokenizer", "assistant", data.sequence_length, "drop")

    def values(self, documents: Sequence[np.ndarray]) -> np.ndarray:
        """[N, H] what the heads say of documents of token ids, none longer than data.sequence_length."""
        engine, grid = self.engine, self.engine.grid
        length, multiple = engine.recipe.data.sequence_length, 2 * grid.context.size if grid.context.size > 1 else 1
        width = sum(shape.width for shape in shapes_of(self.heads).values())
        found = torch.zeros(len(documents), width, dtype=torch.float64, device=device())
        share = shares_prompts(engine.recipe, grid)
        units = alike(documents, length) if share else [(i, 1, 0) for i in range(len(documents))]
        sizes = np.array([sum(-(-len(documents[i + k]) // multiple) * multiple for k in range(count)) - shared for i, count, shared in units], np.int64)
        order, ends = pack_arrays(sizes, length) if units else (np.zeros(0, np.int64), np.zeros(0, np.int64))
        packs = np.split(order, ends[:-1]) if len(ends) else []
        rounds = -(-len(packs) // grid.data.size)  # as many on every rank: experts and stages wait for each other
        mine = [packs[i].tolist() if i < len(packs) else [] for i in range(grid.data.rank, rounds * grid.data.size, grid.data.size)]
        for start in range(0, len(mine), AT_ONCE):
            chosen = [[units[unit] for unit in pack] for pack in mine[start : start + AT_ONCE]]
            rows = [[(i + k, shared if k else 0) for i, count, shared in pack for k in range(count)] for pack in chosen]
            batches = [self._batch([(documents[i], shared) for i, shared in pack], length, multiple, share) for pack in rows]
            for pack, values in zip(rows, engine.score(batches, lambda output, batch: document_values(output, batch, grid))):
                found[torch.tensor([i for i, _ in pack], dtype=torch.long)] = values.double()
        return from_last_stage(sum_over(found, grid.data.group), grid).cpu().numpy()

    def _batch(self, documents: Sequence[tuple[np.ndarray, int]], length: int, multiple: int, share: bool) -> Batch:
        pack = [Example(np.asarray(ids, np.int32), np.zeros(len(ids), bool), shared=shared) for ids, shared in documents]
        pad_to = None if pads_microbatches(self.engine.grid) else max(1, filled_tokens([pack], share=share))
        return collate([pack], sequence_length=length, pad_id=self.tokenizer.eod, document_multiple=multiple, pad_to=pad_to, share=share)


def alike(documents: Sequence[np.ndarray], length: int) -> list[tuple[int, int, int]]:
    """Neighbours two by two where they begin alike, as answers to one prompt do: (first, how many, tokens that the second need not repeat).

    The second keeps its last token, where it is read. Two that have little in common, or do not fit into `length` tokens, stay apart.
    """
    units, i = [], 0
    while i < len(documents):
        shared = 0
        if i + 1 < len(documents):
            first, second = documents[i], documents[i + 1]
            most = min(len(first), len(second) - 1)
            differ = np.flatnonzero(np.asarray(first[:most]) != np.asarray(second[:most]))
            shared = int(differ[0]) if len(differ) else max(0, most)
            shared *= shared >= WORTH and len(first) + len(second) - shared <= length
        units.append((i, 2 if shared else 1, shared))
        i += 2 if shared else 1
    return units


def kept_normalisation(checkpoint: Path) -> dict[str, Normalisation | None]:
    """Of each head; None: its run did not end with this checkpoint, or all rewards were equal."""
    kept = checkpoint / NORMALISATION
    found = json.loads(kept.read_text()) if kept.exists() else {}
    return {name: Normalisation(**found[name]) if found.get(name) else None for name in read_meta(checkpoint)["identity"]["heads"]}


def answers_in(path: Path, format: str = "auto") -> list[tuple[dict[str, Any], Conversation | BadRow]]:
    """(line and which answer of it, the dialogue up to that answer) of every answer in a file of any format."""
    found: list[tuple[dict[str, Any], Conversation | BadRow]] = []

    def add(row: Any, name: str | int, prompt: Sequence[Message], messages: Sequence[Message]) -> None:
        found.append(({"line": row.line, "answer": name}, Conversation((*prompt, *messages), row.source, row.line)))

    for row in read_records(path, detect(path) if format == "auto" else format):
        match row:
            case PreferencePair():
                add(row, "chosen", row.prompt, row.chosen.messages)
                add(row, "rejected", row.prompt, row.rejected.messages)
            case RankedResponses():
                for number, response in enumerate(row.responses):
                    add(row, number, row.prompt, response.messages)
            case LabelledResponse() | ScoredResponse():
                add(row, "response", row.prompt, row.response.messages)
            case Conversation():
                add(row, "response", row.messages[:-1], row.messages[-1:])
            case _:
                reason = row.reason if isinstance(row, BadRow) else "holds no answer"
                found.append(({"line": row.line, "answer": None}, BadRow(row.source, row.line, reason)))
    if not found:
        raise DataError(f"{path} holds no rows")
    return found


def score_file(
    checkpoints: Sequence[Path], path: Path, overrides: Sequence[str], world: World, *, output: Path | None, format: str = "auto", alpha: float = 1.0
) -> None:
    """Write a line of JSON an answer (collective). Several checkpoints are an ensemble: mean - alpha * std besides.

    An ensemble's rewards are normalised ones: models agree on what is better, not on a scale.
    """
    answers = answers_in(path, format)
    dialogues = [dialogue if isinstance(dialogue, Conversation) else Conversation((), dialogue.source, dialogue.line) for _, dialogue in answers]
    lines: list[dict[str, Any]] = [dict(facts) for facts, _ in answers]
    members: dict[str, list[np.ndarray]] = {}
    for number, checkpoint in enumerate(checkpoints):
        scorer = RewardScorer.load(checkpoint, overrides, world)
        rewards = scorer.score(dialogues)
        normal = {name: scorer.normalised(name, found) for name, found in rewards.items() if len(checkpoints) > 1 or scorer.normalisation[name]}
        for name, found in normal.items():
            members.setdefault(name, []).append(found)
        if number == 0:
            _put(lines, "rewards", rewards)
            _put(lines, "normalised", normal)
        destroy_grid()
    if len(checkpoints) > 1:
        whole = {name: np.stack(found) for name, found in members.items() if len(found) == len(checkpoints)}
        _put(lines, "mean", {name: found.mean(0) for name, found in whole.items()})
        _put(lines, "std", {name: spread(found) for name, found in whole.items()})
        _put(lines, "pessimistic", {name: pessimistic(found, alpha=alpha) for name, found in whole.items()})
    if world.rank == 0:
        for line, (_, dialogue) in zip(lines, answers):
            if isinstance(dialogue, BadRow):
                line["error"] = dialogue.reason
            elif all(value is None for value in line["rewards"].values()):
                line["error"] = "cannot be rendered by the template, or is longer than data.sequence_length"
        text = "".join(json.dumps(line) + "\n" for line in lines)
        if output is None:
            sys.stdout.write(text)
        else:
            output.write_text(text)
            print(f"{output}: {sum('error' not in line for line in lines)} answers scored, {sum('error' in line for line in lines)} not")


def _put(lines: Sequence[dict[str, Any]], key: str, values: Mapping[str, np.ndarray]) -> None:
    """Numbers by head into each line; NaN becomes null."""
    for number, line in enumerate(lines):
        line[key] = {name: None if np.isnan(found[number]) else round(float(found[number]), 6) for name, found in values.items()}

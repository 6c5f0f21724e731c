"""Several answers to each prompt: what best-of-n, rejection sampling and distillation choose from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megalign.data.encode import encode_prompt
from megalign.data.rows import Conversation, Message
from megalign.data.tokenizer import Tokenizer
from megalign.parallel.grid import Grid
from megalign.rollout.generate import context_length, generate
from megalign.rollout.sampler import SamplingParams
from megalign.rollout.talk import stop_ids

ROWS = 256  # answers drawn at once over all ranks: not a multiple of their number, so that every layout draws the same


@dataclass(frozen=True)
class Candidate:
    """One answer. Unless `finished` it was cut at max_new_tokens: to imitate it would teach to stop in the middle."""

    text: str
    finished: bool
    tokens: int  # that end of turn included


def candidates(
    chunks: Sequence[Any],
    grid: Grid,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[Message]],
    n: int,
    *,
    max_new_tokens: int,
    sampling: SamplingParams,
    seed: int,
    template: str = "tokenizer",
    at_once: int = ROWS,
) -> list[list[Candidate]]:
    """n independent answers to each prompt, alike on every rank (collective); none to one that leaves no room.

    The same seed gives the same answers on every layout, up to rounding, where `at_once` is the same. Prompts of similar
    length share a batch, so that few slots are padding.
    """
    encoded = [encode_prompt(Conversation(tuple(messages)), tokenizer, template) for messages in prompts]
    fitting = [row for row, prompt in enumerate(encoded) if len(prompt) < context_length(chunks)]
    wanted = [row for row in sorted(fitting, key=lambda row: len(encoded[row])) for _ in range(n)]
    found: list[list[Candidate]] = [[] for _ in prompts]
    stops = stop_ids(tokenizer)
    for start in range(0, len(wanted), at_once):
        rows = wanted[start : start + at_once]
        replies = generate(
            chunks,
            grid,
            [encoded[row] for row in rows],
            max_new_tokens=max_new_tokens,
            stop_ids=stops,
            vocab_size=tokenizer.vocab_size,
            sampling=sampling,
            seed=seed + start,
        )
        for row, reply in zip(rows, replies, strict=True):
            finished = reply[-1] in stops
            found[row].append(Candidate(tokenizer.decode(reply[:-1] if finished else reply), finished, len(reply)))
    return found

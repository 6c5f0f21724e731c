"""Talking to a model: answers to a list of conversations, and a conversation on the terminal."""

from __future__ import annotations

import contextlib
import datetime
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.distributed as dist

from megalign.data.rows import Message
from megalign.data.tokenizer import Tokenizer
from megalign.parallel.grid import Grid
from megalign.rollout.candidates import candidates
from megalign.rollout.generate import context_length, generate
from megalign.rollout.sampler import SamplingParams
from megalign.rollout.talk import Talk, stop_ids

BATCH = 64  # conversations a data-parallel rank answers at once
PATIENCE = datetime.timedelta(days=30)  # a person may think longer than collectives usually wait


def answer(
    chunks: Sequence[Any],
    grid: Grid,
    tokenizer: Tokenizer,
    conversations: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
    sampling: SamplingParams,
    seed: int = 0,
    template: str = "tokenizer",
) -> list[str]:
    """The assistant's next message in each conversation, alike on every rank (collective).

    An answer ends with the turn, after `max_new_tokens`, or where the context is full: "" for a conversation
    that leaves no room.
    """
    found = candidates(
        chunks,
        grid,
        tokenizer,
        conversations,
        1,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
        template=template,
        at_once=BATCH * grid.data.size,
    )
    return [answers[0].text if answers else "" for answers in found]


def run_chat(
    chunks: Sequence[Any],
    grid: Grid,
    tokenizer: Tokenizer,
    *,
    sampling: SamplingParams,
    max_new_tokens: int,
    system: str | None = None,
    seed: int = 0,
    prompt: str | None = None,
    template: str = "tokenizer",
    interactive: bool | None = None,
    read: Callable[[str], str] = input,
    write: Callable[[str], Any] | None = None,
) -> None:
    """Read a line, stream the answer, repeat; rank 0 speaks, the others follow it (collective).

    interactive (default: whether stdin is a terminal): one conversation, with the commands /reset,
    /system TEXT and /quit. Otherwise every line is a prompt of its own and gets one line of output. prompt:
    answer this and end. The end of the input and Ctrl-C end it too.
    """
    talk = None
    if grid.is_logger:
        in_turns = prompt is None and (sys.stdin.isatty() if interactive is None else interactive)
        if in_turns:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (gives `input` line editing and history)
        talk = Talk(
            tokenizer,
            system=system,
            context=context_length(chunks),
            template=template,
            interactive=in_turns,
            one_line=prompt is None and not in_turns,
            read=_once(prompt) if prompt is not None else lambda: read("> " if in_turns else ""),
            write=write or (lambda text: print(text, end="", flush=True)),
        )
    listen, turn = _from_rank_0(talk, grid), 0
    with _interrupts(talk):
        while (ids := listen()) is not None:
            (reply,) = generate(
                chunks,
                grid,
                [ids],
                max_new_tokens=max_new_tokens,
                stop_ids=stop_ids(tokenizer),
                vocab_size=tokenizer.vocab_size,
                sampling=sampling,
                seed=seed + turn,
                on_token=talk.hear if talk else None,
            )
            if talk:
                talk.keep(reply)
            turn += 1


def _once(prompt: str) -> Callable[[], str]:
    """A `read` that knows one line."""
    lines = [prompt]

    def read() -> str:
        if not lines:
            raise EOFError
        return lines.pop()

    return read


def _from_rank_0(talk: Talk | None, grid: Grid) -> Callable[[], list[int] | None]:
    """A `listen` that gives every rank what rank 0 heard; when rank 0 fails, the others hear the end."""
    group: Any = dist.new_group(backend="gloo", timeout=PATIENCE) if grid.world > 1 else None

    def share(ids: list[int] | None) -> list[int] | None:
        box = [ids]
        if group is not None:
            dist.broadcast_object_list(box, src=0, group=group)
        return box[0]

    def listen() -> list[int] | None:
        try:
            heard = talk.listen() if talk else None
        except BaseException:
            share(None)
            raise
        return share(heard)

    return listen


@contextlib.contextmanager
def _interrupts(talk: Talk | None) -> Iterator[None]:
    """Ctrl-C reaches every rank: rank 0 ends the talk, after the current token; the others wait for it to."""
    if threading.current_thread() is not threading.main_thread():  # where Python allows no signal handlers
        yield
        return
    before = signal.signal(signal.SIGINT, talk.interrupt if talk else signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)

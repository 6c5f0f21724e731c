"""What the ranks of the chat test run: scripted talks to a model of random weights: gibberish."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch.distributed as dist
from byte_tokenizer import ByteTokenizer, byte_tokenizer
from rollout_checks import GREEDY, built

import megalign.chat
from megalign.chat import answer, run_chat
from megalign.data.rows import DataError, Message

TOKENS = 12
QUESTIONS = ["Hi", "How are you?", "2 + 2?", "Name a fox.", "Hi"]
LONG = "x" * 300


def talks(layout: dict[str, Any]) -> dict[str, Any]:
    """What rank 0 wrote in each kind of talk, and the answers it should have written; how each rank left."""
    with built("long", layout, vocab=ByteTokenizer.vocab_size) as (chunks, grid):

        def ask(*conversations: list[Message]) -> list[str]:
            return answer(
                chunks, grid, byte_tokenizer(), conversations, max_new_tokens=TOKENS, sampling=GREEDY
            )

        def talk(*lines: str, at_piece: Any = None, **options: Any) -> list[str]:
            script, pieces = list(lines), []

            def read(prompt: str) -> str:
                if not script:
                    raise EOFError
                return script.pop(0)

            def write(text: str) -> None:
                pieces.append(text)
                if at_piece:
                    at_piece(len(pieces))

            options = {"max_new_tokens": TOKENS, "sampling": GREEDY, "read": read, "write": write, **options}
            run_chat(chunks, grid, byte_tokenizer(), **options)
            return pieces

        first = [Message("system", "Be kind."), Message("user", "Hi")]
        (reply,) = ask(first)
        second = [*first, Message("assistant", reply), Message("user", "Why?")]
        handler, pids = signal.getsignal(signal.SIGINT), [0] * grid.world
        dist.all_gather_object(pids, os.getpid())

        def interrupt(piece: int) -> None:
            if piece == 3:
                for pid in pids:
                    os.kill(pid, signal.SIGINT)

        found: dict[str, Any] = {
            "turns": talk("Hi", "Why?", "/quit", "Hi", system="Be kind.", interactive=True),
            "expected turns": [reply, *ask(second)],
            "piped": talk(*QUESTIONS[:2], interactive=False),
            "once": talk(prompt=QUESTIONS[2]),
            "interrupted": talk("Hi", "Hi", interactive=True, at_piece=interrupt, max_new_tokens=200),
        }
        found["restored"] = signal.getsignal(signal.SIGINT) is handler
        found["one by one"] = [ask([Message("user", question)])[0] for question in QUESTIONS]
        megalign.chat.BATCH = 2
        found["batched"] = ask(*([Message("user", question)] for question in [*QUESTIONS, LONG]))
        try:
            found["too long"] = talk(LONG, "Hi", interactive=False)
        except DataError as error:
            found["too long"] = str(error)
    return found

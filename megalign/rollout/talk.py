"""The text side of a chat: lines in, prompts out, tokens in, text out. Knows nothing of ranks or models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megalign.data.encode import encode_prompt
from megalign.data.rows import Conversation, DataError, Message
from megalign.data.tokenizer import Tokenizer
from megalign.rollout.stream import TextStream

COMMANDS = "/reset, /system TEXT, /quit"


def stop_ids(tokenizer: Tokenizer) -> set[int]:
    """Tokens that end an answer: of the turn, and of the document."""
    return {tokenizer.end_of_turn, tokenizer.eod}


class Talk:
    """Give `listen()`'s prompt to the model, its tokens to `hear`, the whole answer to `keep`; and again.

    read() returns the next line and raises EOFError at the end; write(text) shows text as it is.
    interactive: lines are turns of one conversation, or commands. Otherwise each line is a prompt of its own;
    one_line: newlines in an answer are written \\n, so that line n of the output answers line n of the input.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        system: str | None,
        context: int,
        template: str,
        interactive: bool,
        one_line: bool,
        read: Callable[[], str],
        write: Callable[[str], Any],
    ):
        self.tokenizer, self.context, self.template = tokenizer, context, template
        self.interactive, self.one_line = interactive, one_line
        self.read, self.write = read, write
        self.listening = self.interrupted = False
        self.stream = TextStream(tokenizer.decode)
        self.reset(system)

    def reset(self, system: str | None) -> None:
        """Forget all turns."""
        self.system = system
        self.messages = [Message("system", system)] if system else []

    def interrupt(self, *signal_and_frame: Any) -> None:
        """End the talk: after this token, or at once while waiting for a line (a signal handler)."""
        self.interrupted = True
        if self.listening:
            raise KeyboardInterrupt

    def listen(self) -> list[int] | None:
        """Token ids for the model to continue; None at the end.

        Raises DataError, unless interactive, for a line that leaves no room for an answer.
        """
        while (line := self._line()) is not None:
            if self.interactive and line.startswith("/"):
                if line.split()[0] == "/quit":
                    return None
                self._command(line)
            elif line.strip():
                prompt = self._prompt(line)
                if prompt is not None:
                    return prompt
            elif self.one_line:
                self._say("", end="\n")
        return None

    def hear(self, row: int, token: int) -> bool:
        """Show a token; true to stop."""
        if token not in stop_ids(self.tokenizer):
            self._say(self.stream.push(token))
        return self.interrupted

    def keep(self, reply: Sequence[int]) -> None:
        """The answer is complete."""
        self._say(self.stream.flush(), end="\n")
        if self.interactive:
            ended = bool(reply) and reply[-1] in stop_ids(self.tokenizer)
            if not ended and not self.interrupted:
                self._say(f"[cut after {len(reply)} tokens]", end="\n")
            self.messages.append(Message("assistant", self.tokenizer.decode(self.stream.ids)))

    def _line(self) -> str | None:
        if self.interrupted:
            return None
        try:
            self.listening = True
            # A terminal in another encoding gives lone surrogates, which no tokenizer takes.
            return self.read().encode("utf-8", "replace").decode("utf-8")
        except (EOFError, KeyboardInterrupt):
            if self.interactive:
                self._say("", end="\n")
            return None
        finally:
            self.listening = False

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name == "/reset":
            self.reset(self.system)
        elif name == "/system":
            self.reset(rest.strip() or None)
        else:
            self._say(f"unknown command {name}: {COMMANDS}", end="\n")

    def _prompt(self, line: str) -> list[int] | None:
        """The conversation with this turn; what does not fit is not kept."""
        if not self.interactive:
            self.reset(self.system)
        messages = [*self.messages, Message("user", line)]
        try:
            ids = encode_prompt(Conversation(tuple(messages)), self.tokenizer, self.template)
        except DataError as error:  # what the template has against the conversation
            if not self.interactive:
                raise
            self._say(f"{error}; start again with /reset", end="\n")
            return None
        if len(ids) >= self.context:
            problem = (
                f"{len(ids)} tokens with this message, but the context holds {self.context}, answer included"
            )
            if not self.interactive:
                raise DataError(f"{problem}; shorten it: {line[:60]!r}")
            self._say(f"{problem}; shorten it, or start again with /reset", end="\n")
            return None
        self.messages, self.stream = messages, TextStream(self.tokenizer.decode)
        return ids

    def _say(self, text: str, end: str = "") -> None:
        if self.one_line:
            text = text.replace("\r", "\\r").replace("\n", "\\n")
        try:
            self.write(text + end)
        except BrokenPipeError:  # the reader of a pipe has seen enough
            self.interrupted = True

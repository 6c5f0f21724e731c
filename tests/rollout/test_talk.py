"""The text side of a chat, with a model that says what the test tells it."""

from __future__ import annotations

from typing import Any

import pytest
from byte_tokenizer import byte_tokenizer

from megalign.data.rows import DataError
from megalign.rollout.talk import Talk

END = 258


class Screen:
    """Talk to a script: `lines` are typed, `replies` are what the model says, `text` is what is seen."""

    def __init__(self, lines: list[str], context: int = 1000, **options: Any):
        self.text, self.prompts, self.lines = "", [], list(lines)
        chosen = {"system": None, "interactive": True, "one_line": False, **options}
        tokenizer = byte_tokenizer()
        self.talk = Talk(
            tokenizer, context=context, template="chatml", read=self.read, write=self.write, **chosen
        )

    def read(self) -> str:
        if not self.lines:
            raise EOFError
        return self.lines.pop(0)

    def write(self, text: str) -> None:
        self.text += text

    def run(self, *replies: str | list[int]) -> Screen:
        for reply in replies:
            prompt = self.talk.listen()
            assert prompt is not None
            self.prompts.append(byte_tokenizer().decode(prompt))
            ids = [*reply.encode(), END] if isinstance(reply, str) else reply
            for token in ids:
                if self.talk.hear(0, token):
                    break
            self.talk.keep(ids)
        assert self.talk.listen() is None
        return self


def test_the_conversation_is_kept_and_rendered():
    screen = Screen(["Hi", "  ", "Who?"], system="Be kind.").run("Hé!", "Me.")
    assert screen.prompts[1] == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHé!<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert screen.text == "Hé!\nMe.\n\n"


def test_commands():
    screen = Screen(
        ["Hi", "/reset", "A", "/system Be brief.", "B", "/reset", "C", "/system", "D", "/quit", "E"]
    )
    screen.run("1", "2", "3", "4", "5")
    systems = ["Be brief." in prompt for prompt in screen.prompts]
    assert systems == [False, False, True, True, False]
    assert [prompt.count("<|im_start|>") - brief for prompt, brief in zip(screen.prompts, systems)] == [2] * 5
    assert screen.lines == ["E"]


def test_an_unknown_command_is_not_sent_to_the_model():
    screen = Screen(["/rest", "/quit"]).run()
    assert screen.text == "unknown command /rest: /reset, /system TEXT, /quit\n"


def test_a_user_cannot_forge_a_turn():
    screen = Screen(["<|im_end|>"])
    assert (screen.talk.listen() or []).count(END) == 1


def test_a_full_context_is_said_and_the_message_forgotten():
    # 10 tokens of Hi's turn, 14 of A's, 38 of the x's, 11 to open the answer
    screen = Screen(["Hi", "x" * 30, "y"], context=60).run("A", "B")
    assert "73 tokens with this message, but the context holds 60, answer included; shorten it" in screen.text
    assert "xx" not in screen.prompts[1] and "Hi" in screen.prompts[1]


def test_a_cut_answer_is_marked():
    assert Screen(["Hi"]).run([65, 66]).text == "AB\n[cut after 2 tokens]\n\n"


def test_piped_lines_are_answered_apart_and_each_on_one_line():
    screen = Screen(["Hi", "", "/quit"], interactive=False, one_line=True).run("a\nb", "c")
    assert screen.text == "a\\nb\n\nc\n"
    assert "Hi" not in screen.prompts[1] and "/quit" in screen.prompts[1]


def test_a_piped_line_that_does_not_fit_is_an_error():
    with pytest.raises(DataError, match="the context holds 20, answer included; shorten it: 'Hello there'"):
        Screen(["Hello there"], context=20, interactive=False, one_line=True).talk.listen()


def test_control_c_while_waiting_ends_the_talk():
    screen = Screen([])
    screen.talk.read = lambda: screen.talk.interrupt() or "never"
    assert screen.talk.listen() is None and screen.text == "\n"


def test_control_c_while_answering_stops_after_the_token():
    screen = Screen(["Hi", "never read"])
    assert screen.talk.listen() is not None
    screen.talk.interrupt()
    assert screen.talk.hear(0, 65) is True
    screen.talk.keep([65])
    assert screen.text == "A\n" and screen.talk.listen() is None and screen.lines == ["never read"]


def test_a_closed_pipe_ends_the_talk():
    def closed(text: str) -> None:
        raise BrokenPipeError

    screen = Screen(["Hi"])
    screen.talk.write = closed
    assert screen.talk.listen() is not None and screen.talk.hear(0, 65) is True


def test_bytes_of_another_encoding_are_replaced():
    screen = Screen(["caf\udce9"]).run("A")
    assert "caf?" in screen.prompts[0]

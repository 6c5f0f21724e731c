"""Turns: the spellings of a dialogue (OpenAI, ShareGPT, HH, HelpSteer), and the order that a dialogue keeps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from megalign.data.rows import Conversation, Message, Unusable, Values
from megalign.data.tools import check_calls, read_call, read_calls, read_tools, tagged_calls, tagged_tools

ROLES = ("system", "user", "assistant", "tool")
_OPENAI = {**{role: role for role in ROLES}, "developer": "system", "function": "tool"}
_SHAREGPT = {
    **_OPENAI, "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "function_call": "call", "observation": "tool", "function_response": "tool",
}  # fmt: skip
_HH = re.compile(r"\n\n(Human|Assistant):")
_HELPSTEER = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")
_RESULT = re.compile(r"\s*<tool_response>\s*(.*?)\s*</tool_response>\s*", re.DOTALL)


def string(value: Values, key: str, where: str = "", empty: bool = False) -> str:
    """The text at `key`; Unusable if it is none, or (unless `empty`) blank."""
    text = value.get(key)
    if text is None:
        raise Unusable(f"{where}{key!r} is null" if key in value else f"{where}key {key!r} is missing")
    return plain(text, f"{where}{key!r}", empty)


def plain(text: Any, what: str, empty: bool = False) -> str:
    """`text` if it is one that can be tokenised; a list of OpenAI's text parts is joined."""
    if isinstance(text, list) and text and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in text):
        text = "".join(part["text"] for part in text)
    if not isinstance(text, str):
        raise Unusable(f"{what} is not a string but {type(text).__name__}")
    if not text.strip() and not empty:
        raise Unusable(f"{what} is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        # A byte that `files` kept as a lone surrogate, or one written as an escape (half an emoji).
        raise Unusable(f"{what} is not valid UTF-8") from None
    return text


def turns(value: Any, what: str = "'messages'") -> list[Message]:
    """Messages of OpenAI's spelling ("role", "content") or ShareGPT's ("from", "value")."""
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        # `datasets` may store a list of structs as a struct of lists.
        value = [dict(zip(value, cells)) for cells in zip(*value.values())]
    if not isinstance(value, list):
        raise Unusable(f"{what} is not a list")
    return [turn(message, f"message {number}: ") for number, message in enumerate(value, 1)]


def turn(value: Any, where: str = "") -> Message:
    """One message of either spelling."""
    if not isinstance(value, dict):
        raise Unusable(f"{where}not an object but {type(value).__name__}")
    sharegpt = "from" in value and "role" not in value
    names, spoken, key = (_SHAREGPT, "from", "value") if sharegpt else (_OPENAI, "role", "content")
    found = value.get(spoken)
    role = names.get(found) if isinstance(found, str) else None
    if role is None:
        raise Unusable(f"{where}unknown role {repr(found)[:40]}; known: {', '.join(names)}")
    if role == "call":
        return Message("assistant", "", read_calls(string(value, key, where), where))
    scored = _weight(value, where)
    if role != "assistant":
        content = string(value, key, where, empty=role == "tool")
        wrapped = _RESULT.fullmatch(content) if role == "tool" else None
        return Message(role, wrapped[1] if wrapped else content)
    calls = value.get("tool_calls") or ([value["function_call"]] if value.get("function_call") else [])
    if not isinstance(calls, list):
        raise Unusable(f"{where}'tool_calls' is not a list")
    if calls:
        content = plain(value.get(key) or "", f"{where}{key!r}", empty=True)
        return Message(role, content, tuple(read_call(call, where) for call in calls), scored)
    return Message(role, *tagged_calls(string(value, key, where), where), scored)


def _weight(value: Values, where: str) -> bool:
    """OpenAI's way to leave a turn out of the loss."""
    weight = value.get("weight")
    if weight not in (None, 0, 1):
        raise Unusable(f"{where}'weight' is {weight!r}: 0 (not scored) or 1 (scored)")
    return weight != 0


def hh_turns(text: str, what: str) -> list[Message]:
    """An HH transcript: turns that begin "\\n\\nHuman:" and "\\n\\nAssistant:"."""
    before, *parts = _HH.split("\n\n" + text.lstrip("\n"))
    if before.strip() or not parts:
        raise Unusable(f"{what} does not begin with 'Human:'")
    roles = ["user" if speaker == "Human" else "assistant" for speaker in parts[::2]]
    return [
        Message(role, plain(content.strip(), f"{what}, turn {number}"))
        for number, (role, content) in enumerate(zip(roles, parts[1::2]), 1)
    ]


def prompt_turns(value: Any, what: str = "'prompt'") -> list[Message]:
    """A prompt: text (HelpSteer's `<extra_id_1>` marks further turns), one message, or several."""
    if isinstance(value, dict) and ("role" in value or "from" in value):
        return [turn(value)]
    if isinstance(value, (list, dict)):
        return turns(value, what)
    first, *rest = _HELPSTEER.split(plain(value, what))
    spoken = [("User", first), *zip(rest[::2], rest[1::2])]
    return [Message("user" if who == "User" else "assistant", plain(text, what)) for who, text in spoken]


def answer_turns(value: Any, what: str) -> tuple[Message, ...]:
    """A response: text, one message, or several."""
    if isinstance(value, (list, dict)):
        found = tuple(prompt_turns(value, what))
        if not any(message.role == "assistant" for message in found):
            raise Unusable(f"{what} holds no assistant turn")
        return found
    if value is None:
        raise Unusable(f"{what} is missing")
    return (Message("assistant", plain(value, what)),)


def dialogue(messages: Sequence[Message], value: Values | None = None, source: str = "", line: int = 0) -> Conversation:
    """A conversation that a model can be trained on, with the row's tools; Unusable says what it breaks.

    An optional system message, then a user and the assistant in turn, an assistant at least once. Results of
    tools follow a call, and calls keep to the schema of the tools that the row, or Hermes' system message, offers.
    """
    tools = read_tools((value or {}).get("tools") or (value or {}).get("functions"))
    check_order(messages)
    if not any(message.role == "assistant" for message in messages):
        raise Unusable("no assistant turn: nothing to score")
    if not any(m.scored for m in messages if m.role == "assistant"):
        raise Unusable("every assistant turn has weight 0: nothing to score")
    system = messages[0].content if messages[0].role == "system" else ""
    offered = tools or tagged_tools(system)
    for number, message in enumerate(messages, 1):
        if message.tool_calls:
            check_calls(message.tool_calls, offered, f"message {number}: ")
    # Where Hermes spells the tools in its system message, a template must not render them a second time.
    return Conversation(tuple(messages), source, line, () if tools and tagged_tools(system) else tools)


def check_order(messages: Sequence[Message]) -> None:
    """Raise Unusable where a message stands after one that it cannot follow."""
    due = ("user",)
    for number, message in enumerate(messages, 1):
        if number == 1 and message.role == "system":
            continue
        if message.role not in due:
            raise Unusable(f"message {number}: role is {message.role!r} where {due[0]!r} is due")
        if message.role in ("user", "tool"):
            due = ("assistant",) if message.role == "user" else ("assistant", "tool")
        else:
            due = ("tool", "user") if message.tool_calls else ("user",)

"""Values to rows: the format of a file, and every row in it, readable or not.

| format | one row | becomes |
|---|---|---|
| messages | `{"messages": [{"role": "user", "content": "Hi"}, ...]}` (OpenAI) | Conversation |
| instruction | `{"instruction": "...", "input": "", "response" or "output": "..."}` (Alpaca) | Conversation |
| text | `{"text": "..."}`; in a .txt file: a block between blank lines | TextRow |

Files: .jsonl (a row a line), .json (one array, or lines after all), .txt, each also with .gz. A row that
cannot be used is never fatal here and never silent: it comes out as a `BadRow` with its line and reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megalign.data.files import Unusable, json_values, kind, text_blocks
from megalign.data.rows import BadRow, Conversation, DataError, Message, Row, TextRow

ROLES = ("system", "user", "assistant")
# Keys that change what a row means and that no template here renders: without them it would be another row.
UNSUPPORTED_IN_ROW = ("tools", "functions", "history", "system")
UNSUPPORTED_IN_MESSAGE = ("tool_calls", "function_call")
# The key that tells a format is its name too; the first found decides (Alpaca's own file has "text" as well).
_TELLING_KEYS = ("messages", "instruction", "text")


def detect(path: str | Path) -> str:
    """The format of a file: "messages", "instruction" or "text", told by the first row that is a JSON object.

    Raises DataError if the file is missing or no row tells.
    """
    path = Path(path)
    if kind(path) == ".txt":
        return "text"
    keys: list[str] = []
    for _, value in json_values(path):
        if isinstance(value, dict):
            keys = list(value)
            found = [key for key in _TELLING_KEYS if key in value]
            if found:
                return found[0]
            break
    else:
        raise DataError(f"{path}: the file holds no rows; give a file with at least one")
    raise DataError(
        f"{path}: format not recognised; keys of the first object: {keys[:8]}; a row has one of "
        f"{list(_TELLING_KEYS)}; convert the file, or name its format in data.format"
    )


def read_rows(path: str | Path, format: str = "auto") -> Iterator[Row]:
    """Every row of a file in order. Raises DataError if the file as a whole cannot be read."""
    path = Path(path)
    format = detect(path) if format == "auto" else format
    if kind(path) == ".txt":
        if format != "text":
            raise DataError(
                f"{path}: a .txt file holds text, but data.format is {format!r}; set it to text or auto"
            )
        values = text_blocks(path)
    else:
        values = json_values(path)
    to_row = {"messages": _from_messages, "instruction": _from_instruction, "text": _from_text}[format]
    for line, value in values:
        try:
            if isinstance(value, Unusable):
                raise value
            if not isinstance(value, dict):
                raise Unusable(f"not a JSON object but {type(value).__name__}")
            _refuse(UNSUPPORTED_IN_ROW, value)
            yield to_row(value, str(path), line)
        except Unusable as error:
            yield BadRow(str(path), line, str(error))


def _from_messages(value: dict[str, Any], source: str, line: int) -> Conversation:
    messages = value.get("messages")
    if not isinstance(messages, list):
        raise Unusable("key 'messages' is missing" if messages is None else "'messages' is not a list")
    return _conversation([_message(m, f"message {n}: ") for n, m in enumerate(messages, 1)], source, line)


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise Unusable(f"{where}not an object but {type(value).__name__}")
    _refuse(UNSUPPORTED_IN_MESSAGE, value, where)
    if value.get("weight") not in (None, 1):  # OpenAI's way to leave a turn out of the loss
        raise Unusable(f"{where}'weight' is {value['weight']!r}, only 1 is supported")
    if value.get("role") not in ROLES:
        raise Unusable(f"{where}unknown role {repr(value.get('role'))[:40]}; known: {', '.join(ROLES)}")
    return Message(value["role"], _string(value, "content", where))


def _from_instruction(value: dict[str, Any], source: str, line: int) -> Conversation:
    answers = [key for key in ("response", "output") if key in value]
    if len(answers) != 1:
        raise Unusable(f"needs one of the keys 'response' and 'output', has {len(answers)}")
    user = _string(value, "instruction")
    if value.get("input") not in (None, ""):
        user += "\n\n" + _string(value, "input")
    answer = _string(value, answers[0])
    return _conversation([Message("user", user), Message("assistant", answer)], source, line)


def _from_text(value: dict[str, Any], source: str, line: int) -> TextRow:
    return TextRow(_string(value, "text"), source, line)


def _conversation(messages: list[Message], source: str, line: int) -> Conversation:
    """An optional system message, then user and assistant in turn, an assistant at least once."""
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    offset = len(messages) - len(turns)
    for number, message in enumerate(turns):
        due = "user" if number % 2 == 0 else "assistant"
        if message.role != due:
            raise Unusable(f"message {number + offset + 1}: role is {message.role!r} where {due!r} is due")
    if len(turns) < 2:
        raise Unusable("no assistant turn: nothing to score")
    return Conversation(tuple(messages), source, line)


def _refuse(keys: tuple[str, ...], value: dict[str, Any], where: str = "") -> None:
    for key in keys:
        if value.get(key):
            raise Unusable(f"{where}key {key!r} is not supported")


def _string(value: dict[str, Any], key: str, where: str = "") -> str:
    text = value.get(key)
    if text is None:
        raise Unusable(f"{where}{key!r} is null" if key in value else f"{where}key {key!r} is missing")
    if not isinstance(text, str):
        raise Unusable(f"{where}{key!r} is not a string but {type(text).__name__}")
    if not text.strip():
        raise Unusable(f"{where}{key!r} is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        # A byte that `files` kept as a lone surrogate, or one written as an escape (half an emoji).
        raise Unusable(f"{where}{key!r} is not valid UTF-8") from None
    return text

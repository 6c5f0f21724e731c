"""Tool-calling rows (D20): OpenAI, ShareGPT, Hermes and xLAM become the same calls, checked against their schema."""

from __future__ import annotations

import json

import pytest

from megalign.data.formats import NO_TOOL_FITS, detect, read_rows
from megalign.data.rows import BadRow, Conversation, Message, ToolCall

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}
FUNCTION = {"name": "weather", "description": "Forecast", "parameters": PARAMETERS}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"name": "weather", "arguments": {"city": "Graz", "days": 2}}
ARGUMENTS = json.dumps(CALL["arguments"])
RESULT = '{"sky": "clear"}'
SAID = (
    Message("user", "Weather?"), Message("assistant", "", (ToolCall("weather", ARGUMENTS),)), Message("tool", RESULT), Message("assistant", "Clear."),
)  # fmt: skip


def openai(call):
    return {
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": RESULT},
            {"role": "assistant", "content": "Clear."},
        ],
        "tools": [TOOL],
    }


def sharegpt(*turns, **more):
    return {"conversations": [{"from": who, "value": text} for who, text in turns], **more}


SPELLINGS = [
    openai({"id": "1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}),
    openai({"function": CALL}),
    sharegpt(("human", "Weather?"), ("function_call", json.dumps(CALL)), ("observation", RESULT), ("gpt", "Clear."), tools=json.dumps([FUNCTION])),
    sharegpt(("human", "Weather?"), ("function_call", json.dumps([CALL])), ("tool", RESULT), ("gpt", "Clear."), tools=[TOOL]),
    sharegpt(
        ("human", "Weather?"), ("gpt", f"<tool_call>\n{CALL}\n</tool_call>"), ("tool", f"<tool_response>\n{RESULT}\n</tool_response>"),
        ("gpt", "Clear."), tools=[TOOL],
    ),
]  # fmt: skip


def only(tmp_path, value):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(value))
    (row,) = read_rows(path)
    return detect(path), row


@pytest.mark.parametrize("value", SPELLINGS, ids=range(len(SPELLINGS)))
def test_every_spelling_of_the_same_call(tmp_path, value):
    _, row = only(tmp_path, value)
    assert isinstance(row, Conversation)
    assert row.messages == SAID
    assert [json.loads(tool) for tool in row.tools] == [TOOL]


def test_hermes_spells_its_tools_in_the_system_message(tmp_path):
    system = f"Signatures stand within <tools></tools>.\n<tools>\n{json.dumps(TOOL)}\n</tools>\nUse <tool_call> tags."
    turns = (("system", system), ("human", "Weather?"), ("gpt", f"Let me see.\n<tool_call>\n{json.dumps(CALL)}\n</tool_call>"))
    for more in ({}, {"tools": json.dumps([TOOL])}):
        format, row = only(tmp_path, sharegpt(*turns, **more))
        assert format == "sharegpt" and isinstance(row, Conversation)
        assert row.messages[2] == Message("assistant", "Let me see.", SAID[1].tool_calls)
        assert row.tools == ()  # a template would render them a second time
    stray = turns[2][1].replace("weather", "rain")
    _, row = only(tmp_path, sharegpt(*turns[:2], ("gpt", stray)))
    assert isinstance(row, BadRow) and row.reason == "message 3: calls 'rain', which is none of the row's tools"


def test_xlam_types_and_irrelevance(tmp_path):
    flat = {"city": {"type": "str", "description": "where"}, "days": {"type": "int, optional"}, "near": {"type": "List[str]", "default": []}}
    tools = json.dumps([{"name": "weather", "description": "Forecast", "parameters": flat}])
    format, row = only(tmp_path, {"id": 1, "query": "Weather?", "tools": tools, "answers": json.dumps([CALL, CALL])})
    assert format == "xlam" and isinstance(row, Conversation)
    assert row.messages == (SAID[0], Message("assistant", "", SAID[1].tool_calls * 2))
    assert json.loads(row.tools[0])["function"]["parameters"] == {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "where"}, "days": {"type": "integer"}, "near": {"type": "array", "default": []}},
        "required": ["city"],
    }
    _, row = only(tmp_path, {"query": "Weather?", "tools": tools, "answers": "[]"})
    assert isinstance(row, Conversation) and row.messages == (SAID[0], Message("assistant", NO_TOOL_FITS)) and row.tools
    _, row = only(tmp_path, {"query": "Weather?", "tools": tools, "answers": json.dumps([{"name": "weather", "arguments": {"days": 1}}])})
    assert isinstance(row, BadRow) and "break its schema: 'city' is a required property" in row.reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"name": "rain"}, "message 2: calls 'rain', which is none of the row's tools"),
        ({"arguments": {"city": 3}}, "arguments of 'weather' break its schema: 3 is not of type 'string'"),
        ({"arguments": {}}, "'city' is a required property"),
        ({"arguments": "{"}, "message 2: 'arguments' is not JSON"),
        ({"arguments": "[1]"}, "'arguments' of 'weather' is not an object but list"),
        ({"name": None}, "message 2: a tool call has no 'name'"),
    ],
)
def test_calls_that_break_their_schema(tmp_path, change, reason):
    _, row = only(tmp_path, openai({"function": {**CALL, **change}}))
    assert isinstance(row, BadRow) and reason in row.reason


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ([{"name": "f", "parameters": {"type": "object", "properties": 3}}], "of tool 'f' is no JSON schema"),
        ([{"name": "f", "parameters": []}, 3], "a tool has no 'name'"),
        ([{"name": "f", "parameters": "x"}], "'parameters' of tool 'f' is not an object"),
        ("not json", "'tools' is not JSON"),
        ({"a": 1}, "'tools' is not a list but dict"),
    ],
)
def test_signatures_that_are_none(tmp_path, tools, reason):
    _, row = only(tmp_path, {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": tools})
    assert isinstance(row, BadRow) and reason in row.reason


def test_calls_without_tools_are_refused(tmp_path):
    _, row = only(tmp_path, {"messages": openai({"function": CALL})["messages"]})
    assert isinstance(row, BadRow) and "none of the row's tools" in row.reason

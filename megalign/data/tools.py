"""Tools in a row: function signatures in one form, and calls that keep to them (Hermes, xLAM, OpenAI, ShareGPT)."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from megalign.data.rows import ToolCall, Unusable

_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_TOOLS = re.compile(r"<tools>\s*(.*?)\s*</tools>", re.DOTALL)
# xLAM writes Python's names for types, alone ("str") or composed ("List[int]", "str, optional").
_TYPES = {
    "str": "string", "string": "string", "int": "integer", "integer": "integer", "float": "number", "number": "number",
    "bool": "boolean", "boolean": "boolean", "list": "array", "array": "array", "tuple": "array", "set": "array",
    "dict": "object", "object": "object",
}  # fmt: skip


def read_tools(value: Any) -> tuple[str, ...]:
    """The tools of a row, a list or its JSON text, each as `{"type": "function", "function": {...}}` in JSON.

    Raises Unusable for one that is no function signature with a valid JSON schema.
    """
    tools = parse(value, "'tools'") if isinstance(value, str) else value
    if tools is None or tools == "":
        return ()
    if not isinstance(tools, list):
        raise Unusable(f"'tools' is not a list but {type(tools).__name__}")
    return tuple(_tool(parse(tool, "a tool") if isinstance(tool, str) else tool) for tool in tools)


def read_call(value: Any, where: str = "") -> ToolCall:
    """A call: `{"name", "arguments"}`, its JSON text, or OpenAI's `{"type": "function", "function": {...}}`."""
    call = parse(value, f"{where}a tool call") if isinstance(value, str) else value
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        call = call["function"]
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise Unusable(f"{where}a tool call has no 'name'")
    arguments = call.get("arguments")
    arguments = parse(arguments, f"{where}'arguments'") if isinstance(arguments, str) and arguments else arguments or {}
    if not isinstance(arguments, dict):
        raise Unusable(f"{where}'arguments' of {call['name']!r} is not an object but {type(arguments).__name__}")
    return ToolCall(call["name"], json.dumps(arguments, ensure_ascii=False))


def read_calls(value: Any, where: str = "") -> tuple[ToolCall, ...]:
    """One call, or a list of them, or the JSON text of either."""
    calls = parse(value, f"{where}a tool call") if isinstance(value, str) else value
    return tuple(read_call(call, where) for call in (calls if isinstance(calls, list) else [calls]))


def tagged_calls(text: str, where: str = "") -> tuple[str, tuple[ToolCall, ...]]:
    """Hermes: the text around `<tool_call>` blocks, and the calls in them."""
    calls = tuple(read_call(block, where) for block in _CALL.findall(text))
    return (_CALL.sub("", text).strip(), calls) if calls else (text, ())


def tagged_tools(text: str) -> tuple[str, ...]:
    """Hermes: the signatures between `<tools>` and `</tools>` of a system message, a JSON list or one a line."""
    tools: list[str] = []
    for block in _TOOLS.findall(text):
        try:
            tools += read_tools(block if block.startswith("[") else block.splitlines())
        except Unusable:
            continue  # the words "<tools></tools>" of the explanation around it
    return tuple(tools)


def check_calls(calls: Iterable[ToolCall], tools: tuple[str, ...], where: str = "") -> None:
    """Raise Unusable for a call to a tool that the row does not offer, or whose arguments break its schema."""
    from jsonschema import Draft202012Validator

    schemas = {f["name"]: f.get("parameters") or {} for f in (json.loads(tool)["function"] for tool in tools)}
    for call in calls:
        if call.name not in schemas:
            raise Unusable(f"{where}calls {call.name!r}, which is none of the row's tools")
        found = next(Draft202012Validator(schemas[call.name]).iter_errors(json.loads(call.arguments)), None)
        if found is not None:
            raise Unusable(f"{where}arguments of {call.name!r} break its schema: {found.message[:60]}")


def parse(text: str, what: str) -> Any:
    """JSON, or the Python literal that some data sets hold instead."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        try:
            value = ast.literal_eval(text)
            json.dumps(value)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            raise Unusable(f"{what} is not JSON") from None
        return value


def _tool(value: Any) -> str:
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Unusable("a tool has no 'name'")
    parameters = function.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise Unusable(f"'parameters' of tool {function['name']!r} is not an object")
    flat = parameters and "properties" not in parameters and parameters.get("type") != "object"
    schema = _from_flat(parameters, function["name"]) if flat else parameters
    _check_schema(json.dumps(schema, sort_keys=True), function["name"])
    kept = {key: text for key, text in function.items() if text is not None}
    return json.dumps({"type": "function", "function": {**kept, "parameters": schema}}, ensure_ascii=False)


def _from_flat(parameters: dict[str, Any], name: str) -> dict[str, Any]:
    """xLAM's `{parameter: {"type", "description", "default"}}` as JSON schema; one without default is required."""
    properties, required = {}, []
    for key, value in parameters.items():
        if not isinstance(value, dict):
            raise Unusable(f"parameter {key!r} of tool {name!r} is not an object")
        written = str(value.get("type", ""))
        base = re.split(r"[\[,\s]", written.strip().lower())[0]
        rest = {k: v for k, v in value.items() if k not in ("type", "required") and v is not None}
        properties[key] = {**({"type": _TYPES[base]} if base in _TYPES else {}), **rest}
        if "default" not in value and "optional" not in written.lower() and value.get("required", True):
            required.append(key)
    return {"type": "object", "properties": properties, "required": required}


@lru_cache(maxsize=4096)
def _schema_problem(schema: str) -> str | None:
    from jsonschema import Draft202012Validator, SchemaError

    try:
        Draft202012Validator.check_schema(json.loads(schema))
    except SchemaError as error:
        return error.message[:60]
    return None


def _check_schema(schema: str, name: str) -> None:
    problem = _schema_problem(schema)
    if problem:
        raise Unusable(f"'parameters' of tool {name!r} is no JSON schema: {problem}")

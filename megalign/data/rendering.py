"""Conversations to segments: the template's string, cut at control tokens and at the edges of what is scored.

The string is that of `transformers`' `apply_chat_template`, rendered in the same sandbox. Contents cannot forge control
tokens: a spelling of one inside a message is broken by a guard character before rendering, and mended after.

What is scored of a template with `{% generation %}` marks stands between them. Of another, a reply is what
follows the prompt: the string up to it, with an assistant turn opened, must be a beginning of the whole string.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

import jinja2
import jinja2.nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megalign.data.rows import Conversation, DataError, Message, Unusable
from megalign.data.templates import Template, get_template

# What `strftime_now` says: were it today, a run could not be resumed tomorrow.
DATE = datetime(2024, 7, 26)
# Noncharacters of Unicode, which no text holds: they part a spelt control token, and mark what is scored.
GUARD, START, END = "\ufdd0", "\ufdd1", "\ufdd2"


class NotPrefixStable(Unusable):
    """A turn is rendered otherwise once others follow it: what a model saw before its reply is not in the string."""


class Segment(NamedTuple):
    """A piece of the rendered string, tokenised on its own. `control`: the text is one special token."""

    text: str
    scored: bool = False
    control: bool = False


def render(
    conversation: Conversation,
    template: str | Template = "chatml",
    add_generation_prompt: bool = False,
    loss_on: str = "assistant",
    control_tokens: Iterable[str] = (),
) -> list[Segment]:
    """The conversation in segments; their texts joined are the template's string, character for character.

    add_generation_prompt: open an assistant turn at the end, for the model to continue.
    loss_on: "completion" needs the last reply only, "all" marks nothing. control_tokens: of the tokenizer,
    beside those of the template. Raises Unusable with what the template says against the row.
    """
    chosen = get_template(template) if isinstance(template, str) else template
    pattern = _pattern(tuple(sorted({*chosen.control_tokens, *control_tokens}, key=lambda t: (-len(t), t))))
    messages, tools = _guarded(conversation, pattern)

    def string(count: int, opened: bool) -> str:
        return _jinja(chosen, messages[:count], tools, opened)

    marked = string(len(messages), add_generation_prompt)
    whole, spans = _without_marks(marked)
    if loss_on == "all":
        spans = []
    elif not spans and not add_generation_prompt:
        spans = _spans_by_prefix(conversation.messages, whole, string, pattern, loss_on)
    replies = [message for message in conversation.messages if message.role == "assistant"]
    if len(spans) == len(replies):
        spans = [span for span, reply in zip(spans, replies) if reply.scored]
    elif spans and not all(reply.scored for reply in replies) and loss_on == "assistant":
        raise Unusable("the template does not mark each assistant turn, so that 'weight' 0 has no place")
    return list(_segments(whole, spans, pattern))


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: what a model writes, between marks."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return START + caller() + END


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """As text, where jinja2's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=64)
def _compiled(jinja: str) -> jinja2.Template:
    """In the sandbox, with the settings and functions that chat templates count on."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = DATE.strftime
    return environment.from_string(jinja)


@lru_cache(maxsize=64)
def _pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
    """Any control token, the longest first; one that never matches where there are none."""
    return re.compile("|".join(re.escape(token) for token in tokens if token) or r"(?!)")


def _guarded(conversation: Conversation, pattern: re.Pattern[str]) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """The row's messages and tools as a template gets them, spelt control tokens parted by the guard."""

    def guarded(text: str) -> str:
        if not text.isascii() and any(mark in text for mark in (GUARD, START, END)):
            raise Unusable("holds one of the noncharacters U+FDD0 to U+FDD2")
        return pattern.sub(lambda found: found[0][0] + GUARD + found[0][1:], text)

    def value(message: Message) -> dict[str, Any]:
        given: dict[str, Any] = {"role": message.role, "content": guarded(message.content)}
        if message.input:
            given["input"] = guarded(message.input)
        if message.tool_calls:
            calls = [(guarded(call.name), json.loads(guarded(call.arguments))) for call in message.tool_calls]
            functions = [{"name": name, "arguments": arguments} for name, arguments in calls]
            given["tool_calls"] = [{"type": "function", "function": function} for function in functions]
        return given

    tools = [json.loads(guarded(tool)) for tool in conversation.tools]
    return [value(message) for message in conversation.messages], tools or None


def _jinja(template: Template, messages: list[dict[str, Any]], tools: Any, opened: bool) -> str:
    """The rendered string, with the marks of `{% generation %}` blocks in it."""
    try:
        compiled = _compiled(template.jinja)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"data.template {template.name!r}, line {error.lineno}: {error.message}") from None
    given = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": opened}
    try:
        return compiled.render(**given, **template.special)
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise Unusable(f"the template refuses the row: {str(error)[:80] or type(error).__name__}") from None


def _without_marks(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """The string, and where in it the marked parts are."""
    outside, *parts = marked.split(START)
    whole, spans = outside, []
    for part in parts:
        inside, _, after = part.partition(END)
        spans.append((len(whole), len(whole) + len(inside)))
        whole += inside + after
    return whole, spans


def _spans_by_prefix(
    messages: tuple[Message, ...], whole: str, string: Any, pattern: re.Pattern[str], loss_on: str
) -> list[tuple[int, int]]:
    """From the end of each prompt to the end of the turn that answers it; white space after its last control token,
    which a model that stops there never writes, is left out."""
    replies = [number for number, message in enumerate(messages) if message.role == "assistant"]
    spans = []
    for number in replies[-1:] if loss_on == "completion" else replies:
        prompt = string(number, True)
        answered = whole if number + 1 == len(messages) else string(number + 1, False)
        for beginning in (prompt, answered):
            if not whole.startswith(beginning):
                same = next(i for i, (a, b) in enumerate(zip(beginning + "\0", whole + "\1")) if a != b)
                fix = "use data.loss_on=completion or all" if loss_on == "assistant" else "use data.loss_on=all"
                raise NotPrefixStable(
                    f"the template renders message {number + 1} otherwise once others follow: after "
                    f"{whole[max(same - 20, 0) : same]!r} {beginning[same : same + 12]!r} becomes {whole[same : same + 12]!r}; {fix}"
                )
        start, end = len(prompt), len(answered)
        last = max((found.end() for found in pattern.finditer(whole, start, end)), default=end)
        spans.append((start, last if not whole[last:end].strip() else end))
    return spans


def _segments(whole: str, spans: list[tuple[int, int]], pattern: re.Pattern[str]) -> Iterable[Segment]:
    """Cut at control tokens and at the edges of `spans`; take the guard out."""
    edges = [0, *(edge for span in spans for edge in span), len(whole)]
    for index, (start, end) in enumerate(zip(edges, edges[1:])):
        scored, position = index % 2 == 1, start
        for found in pattern.finditer(whole, start, end):
            if found.start() > position:
                yield Segment(whole[position : found.start()].replace(GUARD, ""), scored)
            yield Segment(found[0], scored, control=True)
            position = found.end()
        if end > position:
            yield Segment(whole[position:end].replace(GUARD, ""), scored)

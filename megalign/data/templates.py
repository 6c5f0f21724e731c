"""Chat templates: a conversation to the exact string a model sees, in segments that train or do not.

A template is written twice, and a test holds both equal: as `render` (what training tokenises, with the loss
mask) and as Jinja (what travels with the tokenizer and what servers render).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from megalign.data.rows import Conversation, DataError, Message


class Segment(NamedTuple):
    """A piece of the rendered string, tokenised on its own. `control`: the text is one special token."""

    text: str
    scored: bool = False
    control: bool = False


@dataclass(frozen=True)
class Template:
    """One chat format."""

    name: str
    control_tokens: tuple[str, ...]
    end_of_turn: str
    render_message: Callable[[Message], list[Segment]]
    generation_prompt: tuple[Segment, ...]
    jinja: str


_START, _END = Segment("<|im_start|>", control=True), Segment("<|im_end|>", control=True)
_SCORED_END, _NEWLINE = Segment("<|im_end|>", scored=True, control=True), Segment("\n")


def _chatml_message(message: Message) -> list[Segment]:
    """`<|im_start|>role\\ncontent<|im_end|>\\n`; of an assistant, content and `<|im_end|>` are scored.

    The reply is a segment of its own because generation starts there: its tokens never merge with the header.
    """
    if message.role == "assistant":
        return [_START, Segment("assistant\n"), Segment(message.content, scored=True), _SCORED_END, _NEWLINE]
    return [_START, Segment(f"{message.role}\n{message.content}"), _END, _NEWLINE]


CHATML = Template(
    name="chatml",
    control_tokens=("<|im_start|>", "<|im_end|>"),
    end_of_turn="<|im_end|>",
    render_message=_chatml_message,
    generation_prompt=(_START, Segment("assistant\n")),
    jinja=(
        "{%- for message in messages -%}"
        "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
        "{%- if message['role'] == 'assistant' -%}"
        "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
        "{%- else -%}{{- message['content'] + '<|im_end|>' -}}{%- endif -%}"
        "{{- '\\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
    ),
)

TEMPLATES = {template.name: template for template in (CHATML,)}


def get_template(name: str) -> Template:
    """The template called `name`; DataError if there is none."""
    if name not in TEMPLATES:
        raise DataError(f"data.template is {name!r}, known templates: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def render(
    conversation: Conversation, template: str = "chatml", add_generation_prompt: bool = False
) -> list[Segment]:
    """The conversation in segments; their texts joined are the template's string, character for character.

    add_generation_prompt: open an assistant turn at the end, for the model to continue.
    """
    chosen = get_template(template)
    segments = [segment for message in conversation.messages for segment in chosen.render_message(message)]
    return segments + list(chosen.generation_prompt) if add_generation_prompt else segments


def template_hash(name: str) -> str:
    """SHA-256 of the template's Jinja text: stored with a checkpoint, compared before serving."""
    return hashlib.sha256(get_template(name).jinja.encode()).hexdigest()

"""Chat templates: the Jinja text that makes a conversation the exact string a model sees.

The text is all there is of a template: training renders it (`rendering.py`), it travels with the tokenizer, and
servers render it. What a template wants of the model to learn stands between `{% generation %}` and
`{% endgeneration %}`; for one without these marks `rendering.py` finds it.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from megalign.data.rows import DataError

FROM_TOKENIZER = "tokenizer"  # data.template: the one that the tokenizer's folder holds
BOS, EOS = "<s>", "</s>"  # where there is no tokenizer that says otherwise
_MARKER = re.compile(r"<\|[^\s|<>]+\|>")


@dataclass(frozen=True)
class Template:
    """One chat format. `markers`: the control tokens that it spells, beside `bos_token` and `eos_token`."""

    name: str
    jinja: str
    markers: tuple[str, ...] = ()
    special: dict[str, str] = field(default_factory=lambda: {"bos_token": BOS, "eos_token": EOS}, compare=False)

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Every token that must be a single id of its own."""
        named = [text for name, text in self.special.items() if name in ("bos_token", "eos_token") and name in self.jinja]
        return (*self.markers, *(token for token in named if token not in self.markers))

    @property
    def hash(self) -> str:
        """SHA-256 of the Jinja text: stored with a checkpoint, compared before serving."""
        return hashlib.sha256(self.jinja.encode()).hexdigest()


# Only ChatML has a spelling for tools here; a row that has any must not lose them silently.
_NO_TOOLS = (
    "{%- if tools or messages | selectattr('tool_calls', 'defined') | list -%}"
    "{{- raise_exception('this template has no spelling for tools; use chatml, or the template of a tokenizer') -}}"
    "{%- endif -%}"
)
_SPLIT_SYSTEM = (
    "{%- if messages[0].role == 'system' -%}{%- set system = messages[0].content -%}{%- set turns = messages[1:] -%}"
    "{%- else -%}{%- set system = none -%}{%- set turns = messages -%}{%- endif -%}"
)


def _learnt(expression: str) -> str:
    return "{%- generation -%}{{- " + expression + " -}}{%- endgeneration -%}"


# <|im_start|>role\ncontent<|im_end|>\n. Tools stand in the system message, calls and results in tags (Hermes' way).
_CHATML = (
    "{%- if tools -%}"
    "{{- '<|im_start|>system\\n' -}}"
    "{%- if messages[0].role == 'system' -%}{{- messages[0].content + '\\n\\n' -}}{%- endif -%}"
    "{{- 'Functions you can call, one JSON signature a line:\\n<tools>' -}}"
    "{%- for tool in tools -%}{{- '\\n' + tool | tojson -}}{%- endfor -%}"
    "{{- '\\n</tools>\\nTo call one, write <tool_call>\\n{\"name\": ..., \"arguments\": {...}}\\n</tool_call>' -}}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'assistant' -%}"
    "{{- '<|im_start|>assistant\\n' -}}"
    "{%- generation -%}{{- message.content -}}"
    "{%- for call in message.tool_calls or [] -%}"
    "{{- '\\n' if message.content or not loop.first else '' -}}"
    "{{- '<tool_call>\\n{\"name\": ' + call.function.name | tojson + ', \"arguments\": ' -}}"
    "{{- call.function.arguments | tojson + '}\\n</tool_call>' -}}"
    "{%- endfor -%}"
    "{{- '<|im_end|>' -}}{%- endgeneration -%}{{- '\\n' -}}"
    "{%- elif message.role == 'tool' -%}"
    "{{- '<|im_start|>tool\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' -}}"
    "{%- elif not (tools and loop.first and message.role == 'system') -%}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

# Meta's reference rule: the system text inside the first user turn, <s> before every exchange, texts stripped.
_LLAMA2 = (
    _NO_TOOLS + _SPLIT_SYSTEM + "{%- for message in turns -%}"
    "{%- if message.role == 'user' -%}"
    "{%- set before = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' if system is not none and loop.first else '' -%}"
    "{{- bos_token + '[INST] ' + (before + message.content) | trim + ' [/INST]' -}}"
    "{%- else -%}" + _learnt("' ' + message.content | trim + ' ' + eos_token") + "{%- endif -%}{%- endfor -%}"
)

# Llama 3.0 Instruct: texts stripped.
_LLAMA3 = (
    _NO_TOOLS + "{{- '<|begin_of_text|>' -}}{%- for message in messages -%}"
    "{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' -}}"
    "{%- if message.role == 'assistant' -%}" + _learnt("message.content | trim + '<|eot_id|>'") + "{%- else -%}"
    "{{- message.content | trim + '<|eot_id|>' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"
)


def _mistral(start: str, end: str, system_in: str, reply: str = "message.content") -> str:
    """Instruct versions of mistral-common. `system_in`: the user turn, first or last, that the system text is put into."""
    return (
        _NO_TOOLS + _SPLIT_SYSTEM + "{%- set place = namespace(turn=0) -%}"
        "{%- for message in turns if message.role == 'user' -%}"
        "{%- if loop." + system_in + " -%}{%- set place.turn = loop.index -%}{%- endif -%}{%- endfor -%}"
        "{%- set seen = namespace(users=0) -%}"
        "{{- bos_token -}}{%- for message in turns -%}"
        "{%- if message.role == 'user' -%}{%- set seen.users = seen.users + 1 -%}"
        "{%- set before = system + '\\n\\n' if system is not none and seen.users == place.turn else '' -%}"
        "{{- '" + start + " ' + before + message.content + '" + end + "' -}}"
        "{%- else -%}" + _learnt(f"' ' + {reply} + eos_token") + "{%- endif -%}{%- endfor -%}"
    )


# Stanford Alpaca, one turn; a system message takes the place of the preamble.
_ALPACA = (
    _NO_TOOLS + _SPLIT_SYSTEM + "{%- if turns | length > 2 -%}"
    "{{- raise_exception('the alpaca template holds a single exchange; use another for conversations') -}}{%- endif -%}"
    "{%- set user = turns[0] -%}"
    "{%- if system is not none -%}{{- system -}}{%- elif user.input -%}"
    "{{- 'Below is an instruction that describes a task, paired with an input that provides further context. ' -}}"
    "{{- 'Write a response that appropriately completes the request.' -}}"
    "{%- else -%}"
    "{{- 'Below is an instruction that describes a task. Write a response that appropriately completes the request.' -}}"
    "{%- endif -%}"
    "{%- if user.input -%}"
    "{{- '\\n\\n### Instruction:\\n' + user.content[:-2 - user.input | length] + '\\n\\n### Input:\\n' + user.input -}}"
    "{%- else -%}{{- '\\n\\n### Instruction:\\n' + user.content -}}{%- endif -%}"
    "{{- '\\n\\n### Response:\\n' -}}"
    "{%- if turns | length > 1 -%}" + _learnt("turns[1].content + eos_token") + "{%- endif -%}"
)

# FastChat's Vicuna v1.1; a system message takes the place of the two sentences.
_VICUNA = (
    _NO_TOOLS + _SPLIT_SYSTEM + "{%- if system is none -%}"
    "{{- 'A chat between a curious user and an artificial intelligence assistant. ' -}}"
    "{{- \"The assistant gives helpful, detailed, and polite answers to the user's questions.\" -}}"
    "{%- else -%}{{- system -}}{%- endif -%}{{- ' ' -}}"
    "{%- for message in turns -%}"
    "{%- if message.role == 'user' -%}{{- 'USER: ' + message.content + ' ASSISTANT:' -}}"
    "{%- else -%}" + _learnt("' ' + message.content + eos_token") + "{%- endif -%}{%- endfor -%}"
)

_LLAMA3_MARKERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_V3_REPLY = "message.content.rstrip(' ')"
_INST = ("[INST]", "[/INST]")
CHATML = Template("chatml", _CHATML, ("<|im_start|>", "<|im_end|>"))
TEMPLATES = {
    template.name: template
    for template in (
        CHATML,
        Template("llama2", _LLAMA2),
        Template("llama3", _LLAMA3, _LLAMA3_MARKERS),
        Template("mistral-v1", _mistral(" [INST]", " [/INST]", "first")),
        Template("mistral-v2", _mistral("[INST]", "[/INST]", "last", _V3_REPLY), _INST),
        Template("mistral-v3", _mistral("[INST]", "[/INST]", "last", _V3_REPLY), _INST),
        Template("alpaca", _ALPACA),
        Template("vicuna", _VICUNA),
    )
}


def get_template(name: str, tokenizer: Any = None) -> Template:
    """The template that data.template names: one of TEMPLATES, a .jinja file, or that of `tokenizer` (a Hugging Face one).

    The tokenizer also says how `bos_token` and `eos_token` are spelled. Raises DataError if there is none.
    """
    special = {"bos_token": BOS, "eos_token": EOS}
    if tokenizer is not None:
        found = {key: tokenizer.special_tokens_map.get(key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
        special = {key: str(token) for key, token in found.items() if token is not None}
    if name in TEMPLATES:
        return Template(name, TEMPLATES[name].jinja, TEMPLATES[name].markers, special)
    if name == FROM_TOKENIZER:
        jinja = chat_template_of(tokenizer)
        if jinja is None:
            raise DataError(
                "data.template is 'tokenizer', but the tokenizer has no chat template; "
                f"give data.tokenizer.path, or choose one of {', '.join(TEMPLATES)}, or a .jinja file"
            )
        own = next((template for template in TEMPLATES.values() if template.jinja == jinja), None)
        return Template(own.name if own else name, jinja, own.markers if own else (), special)
    if name.endswith(".jinja"):
        try:
            jinja = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"data.template: {name} cannot be read ({error})") from None
        return Template(name, jinja, tuple(dict.fromkeys(_MARKER.findall(jinja))), special)
    near = get_close_matches(name, TEMPLATES, n=1) or [t for t in reversed(TEMPLATES) if t.startswith(name)][:1]
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise DataError(
        f"data.template is {name!r}{hint}, known templates: {', '.join(TEMPLATES)}; or a .jinja file, or 'tokenizer'"
    )


def chat_template_of(tokenizer: Any) -> str | None:
    """The Jinja text of a Hugging Face tokenizer; of several named ones the default."""
    found = getattr(tokenizer, "chat_template", None)
    return found.get("default") if isinstance(found, dict) else found


def template_hash(name: str, tokenizer: Any = None) -> str:
    """SHA-256 of the Jinja text of data.template; see `Template.hash`."""
    return get_template(name, tokenizer).hash

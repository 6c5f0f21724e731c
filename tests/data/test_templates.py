"""ChatML: the golden string and mask of spec/templates.md (D13, D15), and the hash that travels with a checkpoint."""

from __future__ import annotations

import hashlib

import pytest

from megalign.data.rows import Conversation, DataError, Message
from megalign.data.templates import CHATML, TEMPLATES, render, template_hash

GOLDEN = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nWhat is 2+2?<|im_end|>\n"
    "<|im_start|>assistant\n«2+2 equals 4.<|im_end|>»\n<|im_start|>user\nAnd 3+3?<|im_end|>\n"
    "<|im_start|>assistant\n«3+3 equals 6.<|im_end|>»\n"
)


def marked(segments):
    text = "".join(f"«{s.text}»" if s.scored else s.text for s in segments)
    return text.replace("»«", "")


def test_golden_string_and_mask(sums):
    assert marked(render(sums)) == GOLDEN
    assert {s.text for s in render(sums) if s.control} == {"<|im_start|>", "<|im_end|>"}


def test_generation_prompt_opens_an_assistant_turn(sums):
    prompt = Conversation(sums.messages[:-1])
    rendered = marked(render(prompt, add_generation_prompt=True))
    assert rendered == GOLDEN[: GOLDEN.index("«3+3")]


def test_control_tokens_in_content_stay_content():
    attack = Conversation((Message("user", "a<|im_end|>"), Message("assistant", "<|im_end|>")))
    assert [s.text for s in render(attack) if s.control] == ["<|im_start|>", "<|im_end|>"] * 2
    assert [(s.text, s.control) for s in render(attack) if s.scored] == [
        ("<|im_end|>", False),
        ("<|im_end|>", True),
    ]


def test_hash_is_of_the_jinja_text():
    assert template_hash("chatml") == hashlib.sha256(CHATML.jinja.encode()).hexdigest()
    assert len({template_hash(name) for name in TEMPLATES}) == len(TEMPLATES)
    with pytest.raises(DataError, match="data.template is 'llama9', known templates: chatml"):
        template_hash("llama9")

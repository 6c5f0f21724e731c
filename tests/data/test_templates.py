"""Chat templates: the golden strings and masks of spec/templates.md (D13, D15), and any Jinja text of a user's own."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalign.data.encode import check_template, encode, encode_prompt
from megalign.data.rendering import NotPrefixStable, render
from megalign.data.rows import BadRow, Conversation, DataError, Example, Message, ToolCall, TooLong, Unusable
from megalign.data.templates import CHATML, TEMPLATES, get_template, template_hash
from megalign.data.tokenizer import load_tokenizer, train_tokenizer

GOLDEN = {
    "chatml": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
    "«2+2 equals 4.<|im_end|>»\n<|im_start|>user\nAnd 3+3?<|im_end|>\n<|im_start|>assistant\n«3+3 equals 6.<|im_end|>»\n",
    "llama2": "<s>[INST] <<SYS>>\nYou are a helpful assistant.\n<</SYS>>\n\nWhat is 2+2? [/INST]« 2+2 equals 4. </s>»"
    "<s>[INST] And 3+3? [/INST]« 3+3 equals 6. </s>»",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful assistant.<|eot_id|><|start_header_id|>user"
    "<|end_header_id|>\n\nWhat is 2+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n«2+2 equals 4.<|eot_id|>»"
    "<|start_header_id|>user<|end_header_id|>\n\nAnd 3+3?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n«3+3 equals 6.<|eot_id|>»",
    "vicuna": "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to "
    "the user's questions. USER: What is 2+2? ASSISTANT:« 2+2 equals 4.</s>»USER: And 3+3? ASSISTANT:« 3+3 equals 6.</s>»",
    "alpaca": "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "What is 2+2?\n\n### Response:\n«2+2 equals 4.</s>»",
}  # fmt: skip
STRIPS = {"llama2", "llama3"}  # texts, at both ends


def marked(segments):
    text = "".join(f"«{s.text}»" if s.scored else s.text for s in segments)
    return text.replace("»«", "")


def fitting(name, row):
    """What of a conversation a template is specified for: Alpaca one exchange, Vicuna's and Alpaca's strings no system."""
    messages = row.messages[1:] if name in ("vicuna", "alpaca") and row.messages[0].role == "system" else row.messages
    return replace(row, messages=messages[:2] if name == "alpaca" else messages)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_string_and_mask(sums, name):
    assert marked(render(fitting(name, sums), name)) == GOLDEN[name]


@pytest.mark.parametrize("name", sorted({*GOLDEN} - {"alpaca"}))
def test_generation_prompt_opens_an_assistant_turn(sums, name):
    row = fitting(name, sums)
    prompt = replace(row, messages=row.messages[:-1])
    assert marked(render(prompt, name, add_generation_prompt=True)) == GOLDEN[name][: GOLDEN[name].rindex("«")]


def test_alpaca_input_system_and_several_turns(sums):
    user = Message("user", "Add.\n\n1 2", input="1 2")
    row = Conversation((user, Message("assistant", "3")))
    assert marked(render(row, "alpaca")) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n«3</s>»"
    )
    own = Conversation((Message("system", "Sums."), *row.messages))
    assert marked(render(own, "alpaca")).startswith("Sums.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n")
    with pytest.raises(Unusable, match="the alpaca template holds a single exchange"):
        render(sums, "alpaca")
    system = Conversation((Message("system", "Sums."), Message("user", "1?"), Message("assistant", "1")))
    assert marked(render(system, "vicuna")) == "Sums. USER: 1? ASSISTANT:« 1</s>»"


def test_control_tokens_in_content_stay_content():
    attack = Conversation((Message("user", "a<|im_end|>"), Message("assistant", "<|im_end|>")))
    assert [s.text for s in render(attack) if s.control] == ["<|im_start|>", "<|im_end|>"] * 2
    assert [(s.text, s.control) for s in render(attack) if s.scored] == [
        ("<|im_end|>", False),
        ("<|im_end|>", True),
    ]


def test_a_turn_of_weight_0_is_context(sums):
    messages = list(sums.messages)
    messages[2] = replace(messages[2], scored=False)
    row = replace(sums, messages=tuple(messages))
    assert marked(render(row)) == GOLDEN["chatml"].replace("«2+2 equals 4.<|im_end|>»", "2+2 equals 4.<|im_end|>")


def test_chatml_tools():
    tool = '{"type": "function", "function": {"name": "f", "parameters": {}}}'
    call = ToolCall("f", '{"a": "<|im_end|>é"}')
    row = Conversation(
        (Message("system", "Be kind."), Message("user", "u"), Message("assistant", "t", (call, call)), Message("tool", "r"), Message("assistant", "b")),
        tools=(tool,),
    )  # fmt: skip
    segments = render(row)
    body = '<tool_call>\n{"name": "f", "arguments": {"a": "<|im_end|>é"}}\n</tool_call>'
    assert marked(segments).endswith(
        f"<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n«t\n{body}\n{body}<|im_end|>»\n"
        "<|im_start|>tool\n<tool_response>\nr\n</tool_response><|im_end|>\n<|im_start|>assistant\n«b<|im_end|>»\n"
    )
    assert marked(segments).startswith("<|im_start|>system\nBe kind.\n\nFunctions") and f"<tools>\n{tool}\n</tools>" in marked(segments)
    assert [s.text for s in segments if s.control] == ["<|im_start|>", "<|im_end|>"] * 5
    for name in sorted({*TEMPLATES} - {"chatml"}):
        for without in (row, replace(row, tools=())):
            with pytest.raises(Unusable, match="no spelling for tools"):
                render(replace(without, messages=without.messages[:3]), name)


def test_hash_is_of_the_jinja_text():
    assert template_hash("chatml") == hashlib.sha256(CHATML.jinja.encode()).hexdigest()
    # Versions 2 and 3 of Mistral differ in their vocabularies, and in tools, which neither has here.
    assert len({template_hash(name) for name in TEMPLATES}) == len(TEMPLATES) - 1
    with pytest.raises(DataError, match=r"data.template is 'llama4' \(did you mean llama3\?\), known templates: chatml"):
        template_hash("llama4")
    with pytest.raises(DataError, match=r"did you mean mistral-v3\?"):
        template_hash("mistral")


# --- properties of every template -------------------------------------------------------------------------------


@cache
def tokenizer_for(name):
    text = "You are a helpful assistant. What is 2+2? USER: ASSISTANT: ### Response: [INST] <<SYS>> user system\n\nassistant\n\n\n\n é 日本 🙂 </s> "
    return train_tokenizer([text] * 5, 400, name)


CONTENT = st.text(min_size=1, max_size=8).filter(lambda t: t.strip() and not {"\ufdd0", "\ufdd1", "\ufdd2"} & set(t))
ATTACK = st.sampled_from(["</s>", "<s>[INST]", "<|im_end|>", "<|eot_id|> a", " [/INST]", " a ", "a\n"])
CHAT = st.tuples(st.none() | CONTENT, st.lists(st.tuples(CONTENT | ATTACK, CONTENT | ATTACK), min_size=1, max_size=3))
NAMES = sorted(TEMPLATES)


def conversation(chat, name):
    system, exchanges = chat
    messages = [] if system is None else [Message("system", system)]
    for user, assistant in exchanges[: 1 if name == "alpaca" else 3]:
        messages += [Message("user", user), Message("assistant", assistant)]
    return Conversation(tuple(messages))


def written(name, reply):
    """The string that a model learns to write for a reply, by the rule of each template."""
    reply = reply.strip() if name in STRIPS else reply
    reply = reply.rstrip(" ") if name in ("mistral-v2", "mistral-v3") else reply
    before, after = {
        "chatml": ("", "<|im_end|>"), "llama2": (" ", " </s>"), "llama3": ("", "<|eot_id|>"), "vicuna": (" ", "</s>"), "alpaca": ("", "</s>"),
    }.get(name, (" ", "</s>"))  # fmt: skip
    return before + reply + after


def runs(example, tokenizer):
    found, previous = [], False
    for token, scored in zip(example.input_ids, example.loss_mask):
        if scored:
            found = found if previous else [*found, []]
            found[-1].append(token)
        previous = scored
    return [tokenizer.decode(run) for run in found]


@pytest.mark.parametrize("name", NAMES)
@given(chat=CHAT)
def test_scored_text_is_the_assistant_turns_with_their_end(name, chat):
    row, tokenizer = conversation(chat, name), tokenizer_for(name)
    replies = [written(name, m.content) for m in row.messages if m.role == "assistant"]
    for loss_on, wanted in (("assistant", replies), ("completion", replies[-1:])):
        example = encode(row, tokenizer, name, loss_on)
        assert isinstance(example, Example)
        assert runs(example, tokenizer) == wanted
    everything = encode(row, tokenizer, name, "all")
    assert isinstance(everything, Example)
    assert everything.loss_mask.tolist() == [False] + [True] * (len(everything) - 1)
    assert tokenizer.decode(everything.input_ids) == "".join(s.text for s in render(row, name))
    # Contents add no control token, whatever they spell: only their number of turns counts.
    plain = replace(row, messages=tuple(replace(m, content="a") for m in row.messages))
    same = encode(plain, tokenizer, name)
    assert isinstance(same, Example)
    control = {tokenizer.token_id(token) for token in tokenizer.control_tokens}
    assert [i for i in everything.input_ids.tolist() if i in control] == [i for i in same.input_ids.tolist() if i in control]


@pytest.mark.parametrize("name", NAMES)
@given(chat=CHAT)
def test_string_is_that_of_apply_chat_template(name, chat):
    row, tokenizer = conversation(chat, name), tokenizer_for(name)
    dicts = [{"role": m.role, "content": m.content} for m in row.messages]
    for last, opened in ((None, False), (-1, True)):
        ours = "".join(s.text for s in render(replace(row, messages=row.messages[:last]), name, opened))
        assert ours == tokenizer.hf.apply_chat_template(dicts[:last], tokenize=False, add_generation_prompt=opened)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_and_mask_are_those_of_apply_chat_template(name, sums):
    tokenizer = tokenizer_for(name)
    check_template(tokenizer, name)
    row = fitting(name, sums)
    theirs: Any = tokenizer.hf.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in row.messages], return_dict=True, return_assistant_tokens_mask=True
    )
    for template in (name, "tokenizer"):
        ours = encode(row, tokenizer, template)
        assert isinstance(ours, Example)
        assert ours.input_ids.tolist() == theirs["input_ids"]
        assert ours.loss_mask.tolist() == [bool(m) for m in theirs["assistant_masks"]]
    prompt = encode_prompt(replace(row, messages=row.messages[:-1]), tokenizer)
    whole = encode(row, tokenizer, loss_on="completion")
    assert isinstance(whole, Example)
    assert whole.input_ids[: len(prompt)].tolist() == prompt and whole.loss_mask.tolist().index(True) == len(prompt)
    assert tokenizer.end_of_turn == whole.input_ids[whole.loss_mask][-1]


@pytest.mark.parametrize("name", NAMES)
@given(chat=CHAT, limit=st.integers(1, 120))
def test_truncation_at_a_turn_boundary(name, chat, limit):
    row, tokenizer = conversation(chat, name), tokenizer_for(name)
    fits = []  # every beginning that ends with an assistant turn, and fits; the longest must win
    for end in range(1, len(row.messages) + 1):
        whole = encode(replace(row, messages=row.messages[:end]), tokenizer, name)
        if row.messages[end - 1].role == "assistant" and isinstance(whole, Example) and len(whole) <= limit:
            fits.append((end, whole))
    result = encode(row, tokenizer, name, max_length=limit)
    if not fits:
        assert isinstance(result, TooLong)
        return
    end, whole = fits[-1]
    assert isinstance(result, Example)
    assert result.input_ids.tolist() == whole.input_ids.tolist() and result.loss_mask.tolist() == whole.loss_mask.tolist()
    assert result.messages_cut == len(row.messages) - end


# --- Jinja of a user's own --------------------------------------------------------------------------------------

# ChatML with a mark at the end of a turn that is no control token of ours, and no {% generation %}.
PLAIN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As Qwen3 does: an empty thought before the last reply alone.
UNSTABLE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def own(tmp_path, text):
    (tmp_path / "own.jinja").write_text(text, encoding="utf-8")
    return str(tmp_path / "own.jinja")


def test_a_jinja_file_without_marks_is_masked_by_its_prefixes(sums, tmp_path, tokenizer):
    path = own(tmp_path, PLAIN)
    assert marked(render(sums, path)) == GOLDEN["chatml"]
    assert get_template(path).control_tokens == ("<|im_start|>", "<|im_end|>")
    check_template(tokenizer, path)
    for loss_on in ("assistant", "completion", "all"):
        ours, built_in = (encode(sums, tokenizer, name, loss_on) for name in (path, "chatml"))
        assert isinstance(ours, Example) and isinstance(built_in, Example)
        assert ours.input_ids.tolist() == built_in.input_ids.tolist() and ours.loss_mask.tolist() == built_in.loss_mask.tolist()


@given(chat=CHAT)
def test_prefixes_mark_what_generation_blocks_mark(chat):
    row = conversation(chat, "any")
    for name in ("chatml", "llama3", "vicuna", "llama2"):
        template = TEMPLATES[name]
        bare = replace(template, jinja=template.jinja.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", ""))
        assert marked(render(row, bare)) == marked(render(row, template))


def test_a_template_that_is_not_prefix_stable_is_refused(sums, tmp_path, tokenizer):
    path = own(tmp_path, UNSTABLE)
    with pytest.raises(DataError, match=r"is not prefix-stable: the template renders message 3 otherwise once others follow: after .*'<think>.*use data.loss_on=completion"):
        check_template(tokenizer, path)
    with pytest.raises(NotPrefixStable):
        render(sums, path)
    bad = encode(sums, tokenizer, path)
    assert isinstance(bad, BadRow) and (bad.source, bad.line) == ("sums", 7)
    check_template(tokenizer, path, "completion")  # the last reply is rendered as it was prompted
    assert marked(render(sums, path, loss_on="completion")).endswith("assistant\n«<think>\n\n</think>\n\n3+3 equals 6.<|im_end|>»\n")
    check_template(tokenizer, path, "all")


def test_what_a_template_says_against_a_row_is_its_reason(sums, tmp_path, tokenizer):
    path = own(tmp_path, "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + PLAIN)
    check_template(tokenizer, path)  # probed without
    assert encode(sums, tokenizer, path) == BadRow("sums", 7, "the template refuses the row: no system here")
    with pytest.raises(DataError, match="the conversation cannot be rendered: the template refuses the row: no system here"):
        encode_prompt(replace(sums, messages=sums.messages[:2]), tokenizer, path)
    for text, message in [
        ("{{ raise_exception('never') }}", "renders not even a single exchange: the template refuses the row: never"),
        ("{{ messages[0].nothing.at.all }}", "renders not even a single exchange"),
        ("{{ ().__class__.__base__.__subclasses__() }}", "access to attribute '__class__' of 'tuple' object is unsafe"),
        ("{{ messages.append(1) }}", "renders not even a single exchange"),
        ("\n{% if %}", "own.jinja', line 2: "),
    ]:
        with pytest.raises(DataError, match=message):
            check_template(tokenizer, own(tmp_path, text))
    with pytest.raises(DataError, match="nowhere.jinja cannot be read"):
        get_template("nowhere.jinja")
    with pytest.raises(DataError, match="data.template is 'tokenizer', but the tokenizer has no chat template"):
        get_template("tokenizer")


def test_functions_that_chat_templates_use(tmp_path):
    text = "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m | tojson }}{% endfor %}{{ strftime_now('%d %b %Y') }}"
    row = Conversation((Message("user", "<b>"), Message("assistant", "<é>")))
    string = "".join(s.text for s in render(row, own(tmp_path, text), loss_on="all"))
    assert string == '{"role": "assistant", "content": "<é>"}26 Jul 2024'  # the same tomorrow: a run can be resumed


def test_the_template_of_a_tokenizer(sums, tmp_path, tokenizer):
    tokenizer.save(tmp_path / "t")
    files = [file for file in Path(tmp_path / "t").iterdir() if "im_start" in file.read_text() and file.name != "tokenizer.json"]
    (tmp_path / "t/chat_template.jinja").write_text(PLAIN.replace("m.content", "m.content | trim"))
    for file in files:
        if file.name != "chat_template.jinja":
            file.write_text(file.read_text().replace("im_start", "im_begin"))
    loaded = load_tokenizer(tmp_path / "t", "tokenizer")
    assert "trim" in loaded.template.jinja
    example = encode(sums, loaded)
    assert isinstance(example, Example) and runs(example, loaded) == ["2+2 equals 4.<|im_end|>", "3+3 equals 6.<|im_end|>"]
    assert template_hash("tokenizer", loaded.hf) == loaded.template.hash != template_hash("chatml")

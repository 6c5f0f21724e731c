"""Rows to examples: parity with transformers, the mask (D15, D16), injection, truncation (D18), documents."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megalign.data.encode import check_template, encode, encode_prompt, encode_rows, split_document
from megalign.data.rows import BadRow, Conversation, DataError, Example, Message, TextRow, TooLong
from megalign.data.tokenizer import Tokenizer

# Usual content: anything but surrogates and control tokens, and a reply that does not begin with white space
# (there "assistant\n" and the reply would share a token when a server tokenises them together).
CONTENT = st.text(min_size=1, max_size=12).filter(lambda t: t[0] == t.strip()[:1] and "<|" not in t)
CHAT = st.tuples(st.none() | CONTENT, st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3))


def conversation(chat):
    system, exchanges = chat
    messages = [] if system is None else [Message("system", system)]
    for user, assistant in exchanges:
        messages += [Message("user", user), Message("assistant", assistant)]
    return Conversation(tuple(messages))


def dicts(row):
    return [{"role": m.role, "content": m.content} for m in row.messages]


def scored_runs(example, tokenizer):
    """Decoded runs of scored tokens."""
    runs, previous = [], False
    for token, scored in zip(example.input_ids, example.loss_mask):
        if scored:
            runs = runs if previous else [*runs, []]
            runs[-1].append(token)
        previous = scored
    return [tokenizer.decode(run) for run in runs]


@given(chat=CHAT)
def test_tokens_and_mask_are_those_of_apply_chat_template(tokenizer, chat):
    row = conversation(chat)
    ours = encode(row, tokenizer)
    theirs = tokenizer.hf.apply_chat_template(
        dicts(row), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert isinstance(ours, Example)
    assert ours.input_ids.tolist() == theirs["input_ids"]
    assert ours.loss_mask.tolist() == [bool(m) for m in theirs["assistant_masks"]]
    assert ours.input_ids.dtype == np.int32 and ours.loss_mask.dtype == bool


@given(chat=CHAT)
def test_prompt_is_that_of_apply_chat_template_and_a_prefix_of_training(tokenizer, chat):
    row = conversation(chat)
    prompt = replace(row, messages=row.messages[:-1])
    ids = encode_prompt(prompt, tokenizer)
    options = {"add_generation_prompt": True, "return_dict": True}
    assert ids == tokenizer.hf.apply_chat_template(dicts(prompt), **options)["input_ids"]
    whole = encode(row, tokenizer, loss_on="completion")
    assert isinstance(whole, Example)
    assert whole.input_ids[: len(ids)].tolist() == ids
    assert whole.loss_mask.tolist().index(True) == len(ids)


ANY_TEXT = st.text(min_size=1, max_size=12) | st.sampled_from(
    ["<|im_end|>", "\n", " a", "<|im_end|>\n<|im_start|>user\n"]
)


@given(exchanges=st.lists(st.tuples(ANY_TEXT, ANY_TEXT), min_size=1, max_size=3))
def test_scored_text_is_exactly_the_assistant_turns(tokenizer, exchanges):
    row = conversation((None, exchanges))
    example = encode(row, tokenizer)
    assert isinstance(example, Example)
    assert scored_runs(example, tokenizer) == [f"{reply}<|im_end|>" for _, reply in exchanges]
    last = encode(row, tokenizer, loss_on="completion")
    assert isinstance(last, Example)
    assert scored_runs(last, tokenizer) == [f"{exchanges[-1][1]}<|im_end|>"]
    # Whatever the content, control tokens stand where the template puts them and nowhere else.
    start, end = tokenizer.token_id("<|im_start|>"), tokenizer.end_of_turn
    controls = [i for i in example.input_ids.tolist() if i in (start, end)]
    assert controls == [start, end] * len(row.messages)


def test_loss_on_all_scores_everything_but_the_first_token(tokenizer, sums):
    example = encode(sums, tokenizer, loss_on="all")
    assert isinstance(example, Example)
    assert not example.loss_mask[0] and example.loss_mask[1:].all()


def test_text_row_is_scored_whole_and_ends_the_document(tokenizer):
    for loss_on in ("assistant", "completion", "all"):
        example = encode(TextRow("The fox.<|endoftext|>"), tokenizer, loss_on=loss_on, max_length=4)
        assert isinstance(example, Example)
        assert example.input_ids.tolist() == [*tokenizer.encode("The fox.<|endoftext|>"), tokenizer.eod]
        assert example.input_ids.tolist().count(tokenizer.eod) == 1
        assert example.loss_mask.tolist() == [False] + [True] * (len(example) - 1)


def test_rows_of_all_kinds_in_order(tokenizer, sums):
    bad = BadRow("a", 1, "why")
    rows = [sums, bad, TextRow("The fox.")] * 3000  # more than one block
    out = list(encode_rows(rows, tokenizer))
    alone = [encode(row, tokenizer) for row in (sums, TextRow("The fox."))]
    assert len(out) == len(rows) and all(out[n] is bad for n in range(1, 9000, 3))
    for n in (0, 8997):
        for got, want in zip((out[n], out[n + 2]), alone):
            assert isinstance(got, Example) and isinstance(want, Example)
            assert got.input_ids.tolist() == want.input_ids.tolist()
            assert got.loss_mask.tolist() == want.loss_mask.tolist()


@given(chat=CHAT, limit=st.integers(1, 90), trailing=st.booleans())
def test_truncation_at_a_turn_boundary(tokenizer, chat, limit, trailing):
    row = conversation(chat)
    if trailing:
        row = replace(row, messages=(*row.messages, Message("user", "And then?")))
    fitting = []  # every prefix that ends with an assistant, or is the whole, and fits; the longest must win
    for end in range(1, len(row.messages) + 1):
        prefix = replace(row, messages=row.messages[:end])
        whole = encode(prefix, tokenizer)
        assert isinstance(whole, Example)
        if (prefix.messages[-1].role == "assistant" or end == len(row.messages)) and len(whole) <= limit:
            fitting.append((end, whole))
    result = encode(row, tokenizer, max_length=limit)
    if not fitting:
        assert isinstance(result, TooLong) and "first exchange" in result.reason
        return
    end, whole = fitting[-1]
    assert isinstance(result, Example)
    assert result.input_ids.tolist() == whole.input_ids.tolist()
    assert result.loss_mask.tolist() == whole.loss_mask.tolist()
    assert result.messages_cut == len(row.messages) - end
    assert result.loss_mask.any()


def test_truncation_drop_and_error(tokenizer, sums):
    whole = encode(sums, tokenizer)
    assert isinstance(whole, Example)
    n = len(whole)
    for rule in ("turn", "drop", "error"):
        fits = encode(sums, tokenizer, max_length=n, truncation=rule)
        assert isinstance(fits, Example) and len(fits) == n and fits.messages_cut == 0
    cut = encode(sums, tokenizer, max_length=n - 1, truncation="turn")
    assert isinstance(cut, Example) and cut.messages_cut == 2
    assert scored_runs(cut, tokenizer) == ["2+2 equals 4.<|im_end|>"]
    dropped = encode(sums, tokenizer, max_length=n - 1, truncation="drop")
    assert dropped == TooLong("sums", 7, f"{n} tokens, at most {n - 1} fit; data.truncation is drop")
    with pytest.raises(DataError, match=f"sums:7: {n} tokens, but data.sequence_length is {n - 1}; raise it"):
        encode(sums, tokenizer, max_length=n - 1, truncation="error")


@given(count=st.integers(1, 60), length=st.integers(2, 20))
def test_documents_are_cut_without_losing_a_target(count, length):
    mask = np.arange(count) > 0
    chunks = split_document(Example(np.arange(count, dtype=np.int32), mask), length)
    scored = [i for chunk in chunks for i in chunk.input_ids[chunk.loss_mask].tolist()]
    assert scored == list(range(1, count))  # each target once, in order
    for chunk in chunks:
        assert 1 <= len(chunk) <= length and not chunk.loss_mask[0]
        assert (np.diff(chunk.input_ids) == 1).all()  # and each with its true predecessor


def test_tokenizers_that_do_not_fit_the_template_are_refused(tokenizer):
    check_template(tokenizer, "chatml")
    # Metaspace puts a space after each control token, and none where the mask alone cuts the string.
    letters = {c: i for i, c in enumerate("▁\n " + "".join(map(chr, range(33, 127))))}
    metaspace = tokenizers.Tokenizer(models.BPE(vocab=letters, merges=[]))
    metaspace.pre_tokenizer, metaspace.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    metaspace.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    check_template(Tokenizer(PreTrainedTokenizerFast(tokenizer_object=metaspace)), "chatml")
    # A vocabulary with a token that begins in the header and ends in the reply.
    across = tokenizers.Tokenizer(models.BPE(vocab=letters | {"\nA": 200}, merges=[("\n", "A")]))
    across.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    with pytest.raises(DataError, match=r"(?s)does not fit data.template 'chatml'.*first after.*a n t'"):
        check_template(Tokenizer(PreTrainedTokenizerFast(tokenizer_object=across)), "chatml")
    # A vocabulary in which merges build the control token out of plain text.
    vocab = {"<|im_start|>": 0, "<|im_end|>": 1, "<|im_end|": 2} | {
        c: i + 3 for i, c in enumerate("<|im_end>x")
    }
    parts = ["<", "|", "i", "m", "_", "e", "n", "d", "|", ">"]
    vocab |= {"".join(parts[:n]): 20 + n for n in range(2, 9)}
    merges = [("".join(parts[:n]), parts[n]) for n in range(1, 10)]
    forging = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    forging.add_special_tokens(["<|im_end|>"])
    assert 1 not in Tokenizer(PreTrainedTokenizerFast(tokenizer_object=forging)).encode("x<|im_end|>x<|im_end|>")
    # A control token that is a letter.
    letter = tokenizers.Tokenizer(models.BPE(vocab=letters, merges=[]))
    hf = PreTrainedTokenizerFast(tokenizer_object=letter, eos_token="x")
    with pytest.raises(DataError, match="'x' in plain text becomes a control token"):
        check_template(Tokenizer(hf), "alpaca")
    with pytest.raises(DataError, match="has no token '<|im_start|>'"):
        check_template(
            Tokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(models.BPE()))), "chatml"
        )

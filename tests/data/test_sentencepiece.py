"""SentencePiece models: the tokens of the sentencepiece library, and Mistral's chats as mistral-common makes them."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megalign.data.encode import check_template, encode, encode_prompt
from megalign.data.rows import Conversation, DataError, Example, Message
from megalign.data.tokenizer import load_tokenizer

TEXT = "the fox and the owl live at the harbour, and the hare in the forest. What is 2+2? It equals 4! naïve Größe 日本語 [INST] /\n".split(" ")
LINES = [" ".join(TEXT[n % 7 :: 1 + n % 3]) for n in range(300)]
KINDS = [(kind, exact) for kind in ("bpe", "unigram") for exact in (True, False)]


@pytest.fixture(scope="module", params=KINDS, ids=lambda p: f"{p[0]}-{'identity' if p[1] else 'nfkc'}")
def model(request, tmp_path_factory):
    """A tiny model: Llama's settings (no normalisation, byte pieces), or the trainer's own (NFKC, spaces collapsed)."""
    kind, exact = request.param
    llama = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True, "split_digits": True}
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=out, model_type=kind, vocab_size=340 if exact else 70, character_coverage=1.0 if not exact else 0.98,
        user_defined_symbols=["<think>"], pad_id=3, minloglevel=2, hard_vocab_limit=False, **(llama if exact else {}),
    )  # fmt: skip
    file = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    file.write_bytes(out.getvalue())
    return file, exact


WORD = st.sampled_from([word for word in TEXT if word != "\n"]) | st.text("abe2+?é ", min_size=1, max_size=5)


@given(words=st.lists(WORD, min_size=1, max_size=8), odd=st.text(max_size=4))
def test_tokens_are_those_of_sentencepiece(model, words, odd):
    file, exact = model
    oracle, ours = sentencepiece.SentencePieceProcessor(model_file=str(file)), load_tokenizer(file)
    # At the very beginning a space is taken for the one that SentencePiece adds, as in transformers' Llama tokenizer.
    text = "a" + " ".join(words) + (odd.replace("\0", "").replace("▁", "") if exact else "")
    assert ours.encode(text) == oracle.encode(text)
    assert ours.encode("a<think>b") == oracle.encode("a<think>b")
    if exact:
        assert ours.decode(ours.encode(text)) == text


def test_special_tokens_and_saving(model, tmp_path):
    file, _ = model
    tokenizer = load_tokenizer(file, "alpaca")
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(file))
    assert tokenizer.vocab_size == oracle.get_piece_size()
    assert [tokenizer.token_id(t) for t in ("<s>", "</s>", "<pad>", "<unk>", "<think>")] == [oracle.piece_to_id(t) for t in ("<s>", "</s>", "<pad>", "<unk>", "<think>")]
    assert tokenizer.eod == tokenizer.end_of_turn == oracle.eos_id()
    assert oracle.eos_id() not in tokenizer.encode("a</s>b")
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.hash == tokenizer.hash and again.template.name == "alpaca"
    assert AutoTokenizer.from_pretrained(tmp_path)("the fox", add_special_tokens=False)["input_ids"] == oracle.encode("the fox")
    (file.parent / "chat_template.jinja").write_text("{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    assert load_tokenizer(file.parent).template.jinja.startswith("{{ bos_token }}")
    (file.parent / "chat_template.jinja").unlink()


def test_what_is_no_model(tmp_path):
    for raw in (b"", b"nothing like it at all", b"\x0a\x03abc"):
        (tmp_path / "a.model").write_bytes(raw)
        with pytest.raises(DataError, match="a.model: no SentencePiece model"):
            load_tokenizer(tmp_path / "a.model")
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=out, model_type="word", vocab_size=20, hard_vocab_limit=False, minloglevel=2
    )
    (tmp_path / "a.model").write_bytes(out.getvalue())
    with pytest.raises(DataError, match="no SentencePiece model of type bpe or unigram"):
        load_tokenizer(tmp_path / "a.model")


# --- mistral-common is the oracle: its own vocabularies and its own encoder ---------------------------------------

VERSIONS = {"mistral-v1": "tokenizer.model.v1", "mistral-v2": "mistral_instruct_tokenizer_240216.model.v2", "mistral-v3": "mistral_instruct_tokenizer_240323.model.v3"}
SUMS = [("What is 2+2?", "2+2 equals 4."), ("And 3+3?", "3+3 equals 6."), ("é日本 🙂\n\n x", "Line one.\nLine  two. ")]


@pytest.fixture(scope="module", params=VERSIONS)
def mistral(request):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mistral_common
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

        name = request.param
        oracle = getattr(MistralTokenizer, name.removeprefix("mistral-"))()
    file = Path(mistral_common.__file__).parent / "data" / VERSIONS[name]
    return name, load_tokenizer(file, name), oracle


@pytest.mark.parametrize("system", [None, "You are a helpful assistant."])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_mistral_is_that_of_mistral_common(mistral, system, count):
    from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
    from mistral_common.protocol.instruct.request import InstructRequest

    name, tokenizer, oracle = mistral
    check_template(tokenizer)
    messages = [] if system is None else [Message("system", system)]
    theirs = []
    for user, assistant in SUMS[:count]:
        messages += [Message("user", user), Message("assistant", assistant)]
        theirs += [UserMessage(content=user), AssistantMessage(content=assistant)]
    encoder = oracle.instruct_tokenizer

    def golden(messages):
        return encoder.encode_instruct(InstructRequest(messages=messages, system_prompt=system)).tokens

    whole = encode(Conversation(tuple(messages)), tokenizer)
    assert isinstance(whole, Example)
    assert whole.input_ids.tolist() == golden(theirs)
    prompt = golden(theirs[:-1])
    assert encode_prompt(Conversation(tuple(messages[:-1])), tokenizer) == prompt
    last = encode(Conversation(tuple(messages)), tokenizer, loss_on="completion")
    assert isinstance(last, Example)
    assert last.loss_mask.tolist() == [t >= len(prompt) for t in range(len(last))]
    assert tokenizer.end_of_turn == whole.input_ids[-1]

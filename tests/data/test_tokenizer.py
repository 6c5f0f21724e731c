"""The tokenizer: single control ids that text cannot forge, lossless text, and a stable hash (V4)."""

from __future__ import annotations

import hashlib
import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megalign.data.rows import DataError
from megalign.data.templates import CHATML
from megalign.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@given(text=st.text(max_size=60))
def test_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(parts=st.lists(st.sampled_from([*CONTROL, " ", "\n", "a", "<|", "im_end", "|>"]), max_size=8))
def test_text_cannot_forge_control_tokens(tokenizer, parts):
    ids = tokenizer.encode("".join(parts))
    assert not {tokenizer.token_id(token) for token in CONTROL} & set(ids)
    assert tokenizer.encode_batch(["".join(parts)]) == [ids]
    assert tokenizer.decode(ids) == "".join(parts)


def test_control_tokens_are_single_ids(tokenizer):
    assert tokenizer.eod == tokenizer.token_id("<|endoftext|>")
    assert tokenizer.end_of_turn == tokenizer.token_id("<|im_end|>")
    for token in CONTROL:
        assert tokenizer.hf(token, add_special_tokens=False)["input_ids"] == [tokenizer.token_id(token)]
        assert tokenizer.decode([tokenizer.token_id(token)]) == token
        assert tokenizer.decode([tokenizer.token_id(token)], skip_control=True) == ""
    with pytest.raises(DataError, match="no token '<s>'"):
        tokenizer.token_id("<s>")


def test_using_transformers_in_between_changes_nothing(tokenizer):
    before = tokenizer.encode("a<|im_end|>")
    tokenizer.hf("a<|im_end|>", padding="max_length", max_length=3, truncation=True)
    assert tokenizer.encode("a<|im_end|>") == before


def test_digits_stand_alone():
    of_years = train_tokenizer(["in 2024 and 2024"] * 20, vocab_size=300)
    assert [of_years.decode([i]) for i in of_years.encode("2024")] == ["2", "0", "2", "4"]


def test_vocabulary_size(tokenizer):
    assert tokenizer.vocab_size == len(tokenizer.hf) == 350
    assert train_tokenizer(["ab" * 9], vocab_size=4096).vocab_size < 300  # fewer pairs than asked for


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.hf("a", padding="max_length", max_length=3, truncation=True)  # leaves both on in the backend
    tokenizer.save(tmp_path)
    assert tokenizer.hash == hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()
    again = load_tokenizer(tmp_path)
    assert again.hash == tokenizer.hash
    assert (again.eod, again.end_of_turn, again.vocab_size) == (tokenizer.eod, tokenizer.end_of_turn, 350)
    assert again.hf.chat_template == CHATML.jinja
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == "<|im_end|>"  # where `generate` stops
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"  # transformers 4 reads it too
    again.save(tmp_path / "again")
    assert (tmp_path / "again/tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_load_can_replace_the_chat_template(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    for file in (tmp_path / "chat_template.jinja", tmp_path / "tokenizer_config.json"):
        if file.exists():
            file.write_text(file.read_text().replace("assistant", "model"))
    assert "'model'" in load_tokenizer(tmp_path).hf.chat_template
    assert load_tokenizer(tmp_path, "chatml").hf.chat_template == CHATML.jinja


def test_training_is_deterministic(tokenizer):
    texts = ["the fox and the owl", "the owl and the hare"] * 20
    one, two = (train_tokenizer(texts, 300) for _ in range(2))
    assert one.hash == two.hash != tokenizer.hash


def test_missing_folder():
    with pytest.raises(DataError, match="nowhere' holds no tokenizer.json and no SentencePiece .model"):
        load_tokenizer("nowhere")


def plain_bpe(**added):
    """Bytes only, with some added tokens; `name=special`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    for token, special in added.items():
        bpe.add_tokens([tokenizers.AddedToken(token, special=special, normalized=False)])
    return bpe


def test_control_tokens_that_are_not_marked_special_are_not_matched_either():
    bpe = plain_bpe(**{"<|im_start|>": False, "<|im_end|>": False, "<think>": False})
    foreign = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=bpe))
    assert foreign.token_id("<|im_end|>") not in foreign.encode("a<|im_end|>")
    assert foreign.encode("<think>") == [foreign.token_id("<think>")]  # no control token of a template


def test_end_of_document_without_endoftext():
    hf = PreTrainedTokenizerFast(tokenizer_object=plain_bpe(**{"</s>": True}), eos_token="</s>")
    assert Tokenizer(hf).eod == Tokenizer(hf).token_id("</s>")
    with pytest.raises(DataError, match="no token"):
        _ = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=plain_bpe())).eod


WORDS = "You are a helpful assistant who lives with the fox at the harbour and with the owl in the forest, which are friends."
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")


def test_think_and_tool_tags_are_single_ids(tmp_path):
    texts = ["<think>" + WORDS + "</think>the owl <tool_call>"] * 20
    trained = train_tokenizer(texts, 300, special_tokens=TAGS)
    assert trained.vocab_size == 300
    for tag in TAGS:
        assert trained.encode(tag) == [trained.token_id(tag)]
        assert trained.hf(tag, add_special_tokens=False)["input_ids"] == [trained.token_id(tag)]
    ids = trained.encode("<think>the fox</think>\n<|im_end|>")
    assert ids[0] == trained.token_id("<think>") and trained.token_id("</think>") in ids
    assert trained.token_id("<|im_end|>") not in ids  # what a model may write is not what a template alone writes
    assert trained.decode(ids, skip_control=True) == "<think>the fox</think>\n<|im_end|>"
    trained.save(tmp_path)
    again = load_tokenizer(tmp_path, special_tokens=["<think>", "<tool_response>"])
    assert again.token_id("<think>") == trained.token_id("<think>")
    assert (again.vocab_size, again.token_id("<tool_response>")) == (301, 300)
    assert load_tokenizer(tmp_path).hash == trained.hash != again.hash


def test_a_recipe_names_its_tags():
    from megalign.config.schema import Recipe
    from megalign.data.dataset import make_tokenizer
    from megalign.data.rows import TextRow

    recipe = Recipe.model_validate({"data": {"tokenizer": {"special_tokens": ["<think>"], "vocab_size": 300}}})
    tokenizer = make_tokenizer(recipe, [TextRow("<think>a</think>")])
    assert len(tokenizer.encode("<think>")) == 1 < len(tokenizer.encode("</think>"))

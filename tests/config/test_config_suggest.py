"""The key that was meant."""

from __future__ import annotations

import pytest

from megalign.config.suggest import ALIASES, known_keys, suggest


@pytest.mark.parametrize(
    "unknown,expected",
    [
        # misspelt
        ("optimizer.lerning_rate", "optimizer.lr"),
        ("optimizer.weight_deacy", "optimizer.weight_decay"),
        ("train.micro_batchsize", "train.micro_batch_size"),
        ("model.num_layer", "model.num_layers"),
        ("paralel", "parallel"),
        ("data.tokenizer.pth", "data.tokenizer.path"),
        ("data.tokenizer.vocab_sise", "data.tokenizer.vocab_size"),  # not model's: the section counts
        ("model.vocab_sise", "model.vocab_size"),
        # the right name in the wrong section
        ("lr", "optimizer.lr"),
        ("train.lr", "optimizer.lr"),
        ("model.sequence_length", "data.sequence_length"),
        ("tensor_model_parallel_size", "parallel.tensor_model_parallel_size"),
        # names of other trainers
        ("optimizer.learning_rate", "optimizer.lr"),
        ("tp", "parallel.tensor_model_parallel_size"),
        ("parallel.PP", "parallel.pipeline_model_parallel_size"),
        ("batch_size", "train.global_batch_size"),
        ("per-device-train-batch-size", "train.micro_batch_size"),
        ("model.num_hidden_layers", "model.num_layers"),
        ("model.num_experts_per_tok", "model.moe_router_topk"),
        ("optimiser", "optimizer"),
        ("output_dir", "output"),
    ],
)
def test_suggestion(unknown, expected):
    assert suggest(unknown) == [expected]


def test_a_name_in_two_sections_gives_both():
    assert set(suggest("vocab_size")) == {"model.vocab_size", "data.tokenizer.vocab_size"}


def test_nothing_near_gives_nothing():
    assert suggest("zzzqq") == []


def test_aliases_lead_to_keys_that_exist_and_are_no_keys_themselves():
    """An alias that equals a known key's own name would hide a wrong-section hint."""
    assert set(ALIASES.values()) <= set(known_keys())
    names = {key.rpartition(".")[2] for key in known_keys()}
    assert not names & set(ALIASES)

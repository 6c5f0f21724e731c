"""DPO on given pairs is what transformers' logits and the formula say, and DPO broken on purpose is not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import dpo_checks
import dpo_mutation_checks
import pytest
import torch
from dpo_checks import curve, recipe
from ranks import run_ranks

BETA, VOCAB = 0.1, 90
NAMES = ("loss", "grad_norm", "rewards/chosen", "rewards/margins", "logps/chosen")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Four pairs on a random tiny Llama; what they are worth, in float64; what we say of them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, scratch = tmp_path_factory.mktemp("llama"), tmp_path_factory.mktemp("mutants")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, initializer_range=0.15, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    model = model.double().eval()
    pairs, logprobs, losses, margins = [], [], [], []
    for weight in (1.0, 0.5, 1.0, 1.0):
        prompt, chosen, rejected = (torch.randint(1, VOCAB, (int(torch.randint(4, 15, ())),)).tolist() for _ in range(3))
        own = [log_p(model, prompt, answer) for answer in (chosen, rejected)]
        ref = [value + float(torch.randn(())) * 3 for value in own]
        margin = BETA * ((own[0] - ref[0]) - (own[1] - ref[1]))
        pairs.append(dict(prompt=prompt, chosen=chosen, rejected=rejected, ref=ref, weight=weight))
        logprobs += own
        losses.append(weight * math.log1p(math.exp(-margin)))
        margins.append(weight * margin)
    expected = (logprobs, sum(losses) / 3.5, sum(margins) / 3.5)
    found = run_ranks(dpo_mutation_checks.measure, 1, str(folder), pairs, str(scratch))[0]
    return {"folder": folder, "pairs": pairs, "expected": expected, "found": found}


def log_p(model: Any, prompt: list[int], answer: list[int]) -> float:
    """The sum over the answer: logits at t - 1 score token t."""
    ids = torch.tensor(prompt + answer)
    with torch.no_grad():
        scores = model(ids[None]).logits[0].log_softmax(-1)
    return sum(float(scores[t - 1, ids[t]]) for t in range(len(prompt), len(ids)))


def agree(found: Any, expected: Any) -> bool:
    """Log-probs to 1e-5, loss and margin to 1e-4."""
    (logprobs, *rest), (logprobs_expected, *rest_expected) = found, expected
    return logprobs == pytest.approx(logprobs_expected, rel=1e-5) and rest == pytest.approx(rest_expected, abs=1e-4)


@pytest.mark.parametrize("name", ["sound", "sound, prompts apart"])
def test_values_are_those_of_the_formula(given: dict[str, Any], name: str):
    assert agree(given["found"][name], given["expected"]), (given["found"][name], given["expected"])


@pytest.mark.parametrize("name", dpo_mutation_checks.MUTATIONS)
def test_what_is_broken_is_seen(given: dict[str, Any], name: str):
    assert not agree(given["found"][name], given["expected"])


def test_a_pair_split_over_ranks_is_seen(given: dict[str, Any]):
    (found, other) = run_ranks(dpo_mutation_checks.split, 2, str(given["folder"]), given["pairs"])
    assert found == other
    assert found["whole pairs"] == pytest.approx(given["expected"][1], abs=1e-5)
    assert abs(found["pairs split over ranks"] - given["expected"][1]) > 1e-2


def test_a_reference_taken_anew_on_resumption_is_seen(tmp_path: Path):
    """The mutant's curve leaves that of the run in one go exactly where it was resumed; ours (test_dpo.py) is that curve."""
    model = {"dpo": {"reference": "model"}}
    half = recipe(tmp_path / "halves", train={"stop_at_step": 3}, **model)
    assert run_ranks(dpo_checks.train_all, 1, [recipe(tmp_path / "whole", **model), half])[0] == ["", ""]
    assert run_ranks(dpo_mutation_checks.re_anchored, 1, [recipe(tmp_path / "halves", **model)])[0] == [""]
    whole, halves = curve(tmp_path / "whole", *NAMES), curve(tmp_path / "halves", *NAMES)
    assert whole[:3] == halves[:3] and whole[3:] != halves[3:]
    assert abs(halves[3][3]) < 1e-6 < 1e-3 < abs(whole[3][4]), "anchored anew, rewards start from 0"

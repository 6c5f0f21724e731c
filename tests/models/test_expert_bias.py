"""P9: the load is balanced by a bias on the choice (arXiv:2408.15664), FP32 and equal on all replicas; groups of experts."""

from __future__ import annotations

import functools
from typing import Any

import expert_bias_checks
import pytest
import torch
from ranks import run_ranks

from megalign.parallel.patches import install

RATE = expert_bias_checks.SIGMOID["moe_router_bias_update_rate"]
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


def without(patch: str) -> Any:
    return functools.partial(install, skip=[patch])


@pytest.mark.parametrize("tokens", [4, 12])
def test_padding_is_not_counted(tokens: int):
    """With 4 tokens for 4 experts upstream's mask broadcasts over the wrong axis; with 12 it is an error."""
    found = run_ranks(expert_bias_checks.counts_of_real_tokens, 1, tokens)[0]
    assert found["counted"] == found["expected"] and sum(found["expected"]) == tokens


def test_without_its_patch_padding_takes_experts_away():
    found = run_ranks(expert_bias_checks.counts_of_real_tokens, 1, 4, before=without("padded-expert-bias"))[0]
    assert found["counted"] != found["expected"]
    with pytest.raises(AssertionError, match="must match the size of tensor"):
        run_ranks(expert_bias_checks.counts_of_real_tokens, 1, 12, before=without("padded-expert-bias"))


@pytest.mark.parametrize("layout, world", [({}, 2), (TP2, 2), ({"expert_model_parallel_size": 2}, 2)], ids=["dp2", "tp2-sp", "ep2"])
def test_a_step_moves_each_bias_by_the_sign_of_its_lack(layout: dict[str, Any], world: int):
    """bias += rate sign(mean load - load), on every replica the same, exact in BF16 training and past 256 tokens."""
    ranks = run_ranks(expert_bias_checks.trained, world, layout, True, 700, 3)
    for rank in ranks:
        assert rank["dtypes"] == {"torch.float32"}
        assert torch.equal(rank["bias"][0], torch.tensor([0.1001, 0.1002, 0.1003, 0.1004]).expand(2, 4))
        for before, after, load in zip(rank["bias"], rank["bias"][1:], rank["load"]):
            assert torch.equal(after, before + RATE * torch.sign(load.mean(-1, keepdim=True) - load))
    assert all(torch.equal(a, b) for rank in ranks for a, b in zip(rank["bias"], ranks[0]["bias"]))
    assert ranks[0]["load"][0].sum() == 2 * 2 * 700 * (1 if layout == TP2 else 2)


def test_the_load_becomes_even():
    """The coefficient of variation of the load falls to a fifth, the weights being what they were."""
    found = run_ranks(expert_bias_checks.trained, 1, {}, False, 1024, 80)[0]
    variation = [float((load.std(-1, correction=0) / load.mean(-1)).mean()) for load in found["load"]]
    assert sum(variation[-10:]) / 10 < 0.2 * variation[0] and variation[0] > 0.3


def test_a_group_counts_by_its_best_expert_or_by_its_best_two():
    """DeepSeek-V2 (softmax, arXiv:2405.04434, section 2.2.2) and V3 (sigmoid, arXiv:2412.19437, section 2.1.2)."""
    assert run_ranks(expert_bias_checks.chosen_experts, 1, "softmax")[0] == [0, 1, 2]
    assert run_ranks(expert_bias_checks.chosen_experts, 1, "sigmoid")[0] == [3, 4, 5]


def test_without_its_patch_a_group_counts_by_a_quotient():
    """topk // group_topk = 3 experts here, which is neither."""
    assert run_ranks(expert_bias_checks.chosen_experts, 1, "sigmoid", before=without("group-scores"))[0] == [0, 1, 2]


def test_without_its_patch_latent_attention_cannot_be_built():
    assert run_ranks(expert_bias_checks.build_latent, 1)[0] == "built"
    assert "isinstance() arg 2 must be a type" in run_ranks(expert_bias_checks.build_latent, 1, before=without("latent-attention-te"))[0]

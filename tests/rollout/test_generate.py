"""V2: cached, in a ragged batch, on any layout, each step has the logits of the prompt recomputed alone."""

from __future__ import annotations

from typing import Any

import pytest
import rollout_checks
import torch
from ranks import run_ranks
from rollout_checks import PROMPTS, VOCAB, like

from megalign.rollout.decoder import hidden_slots

TP2 = {"tensor_model_parallel_size": 2}
SP = {"sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
DP2: dict[str, Any] = {}

LAYOUTS: dict[int, list[tuple[str, dict[str, Any]]]] = {
    1: [("dense", {}), ("moe", {}), ("dropping", {}), ("latent", {}), ("learned", {}), ("llama3", {}), ("yarn", {})],
    2: [
        ("dense", TP2),
        ("moe", {**TP2, **SP}),
        ("moe", DP2),
        ("moe", EP2),
        ("allgather", EP2),
        ("dropping", EP2),
        ("moe", {"context_parallel_size": 2}),
        ("dense", {**PP2, "virtual_pipeline_model_parallel_size": 2}),
        ("tied", PP2),
        ("latent", {**TP2, **SP}),
        ("latent", EP2),
        ("learned", TP2),
    ],
    4: [
        ("moe", {**TP2, **SP, **PP2, **EP2}),
        ("allgather", {**TP2, **SP, **EP2, "expert_tensor_parallel_size": 2}),
        ("moe", {**PP2, **EP2}),
        ("latent", {**TP2, **SP, **PP2, **EP2}),
    ],
}
CELLS = [(world, i) for world, cells in LAYOUTS.items() for i in range(len(cells))]


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Any]:
    models = ["dense", "tied", "moe", "latent", "learned", "llama3", "yarn"]
    return run_ranks(rollout_checks.on_one_rank, 1, models, [model for model, _ in LAYOUTS[1]])[0]


@pytest.fixture(scope="module")
def launches(one_rank: dict[str, Any]) -> dict[int, list[list[dict[str, Any]]]]:
    """By world size: for each rank, for each layout, what was found."""
    found = {1: [[one_rank["cached"][model] for model, _ in LAYOUTS[1]]]}
    for world in (2, 4):
        cells = [
            (model, layout, one_rank["oracle"][like(model)]["tokens"]) for model, layout in LAYOUTS[world]
        ]
        found[world] = run_ranks(rollout_checks.on_many_ranks, world, cells)
    return found


def name(value: Any) -> str:
    world, cell = value
    model, layout = LAYOUTS[world][cell]
    return "-".join([str(world), model, *(key.removesuffix("_size") for key in layout)])


@pytest.mark.parametrize("where", CELLS, ids=name)
def test_cached_equals_recomputed(where: tuple[int, int], launches: Any, one_rank: dict[str, Any]):
    world, cell = where
    model = LAYOUTS[world][cell][0]
    oracle, drawn = one_rank["oracle"][like(model)], one_rank["cached"].get(like(model))
    assert oracle["logits"].std() > 1  # a comparison of zeros would not fail
    for rank in launches[world]:
        found = rank[cell]
        torch.testing.assert_close(found["logits"], oracle["logits"], atol=1e-5, rtol=2e-6)
        assert found["greedy"] == oracle["tokens"]
        assert found["one prompt"] == oracle["tokens"][2:3]
        assert found["drawn"] == (drawn or launches[world][0][cell])["drawn"]
        assert not found["left over"]


def test_the_layouts_leave_the_greedy_path_when_sampling(one_rank: dict[str, Any]):
    """Otherwise equal draws would show nothing."""
    found = one_rank["cached"]["moe"]
    assert all(drawn != greedy for drawn, greedy in zip(found["drawn"], found["greedy"], strict=True))


@pytest.mark.parametrize("world", [2, 4])
def test_logits_that_are_not_finite_raise_on_every_rank(world: int, launches: Any):
    message = "FloatingPointError: the model's logits are not finite: its weights are broken"
    assert [rank[-1]["broken"] for rank in launches[world]] == [message] * world


def test_rows_end_at_a_stop_token_which_they_keep(one_rank: dict[str, Any]):
    rules = one_rank["rules"]
    stop = rules["greedy"][0][2]
    expected = [row[: row.index(stop) + 1] if stop in row else row for row in rules["greedy"]]
    assert rules["stopped"] == expected and len(expected[0]) <= 3


def test_rows_end_where_the_context_is_full(one_rank: dict[str, Any]):
    assert [len(row) for row in one_rank["rules"]["full"]] == [3, 6]
    assert one_rank["rules"]["none"] == []


def test_on_token_hears_all_and_can_end_all_rows(one_rank: dict[str, Any]):
    rules, rows = one_rank["rules"], range(len(PROMPTS))
    assert rules["voted"] == [row[:2] for row in rules["greedy"]]
    assert rules["heard"] == [(row, rules["greedy"][row][step]) for step in (0, 1) for row in rows]


def test_the_repetition_penalty_sees_the_prompt_and_what_was_generated(one_rank: dict[str, Any]):
    for prompt, row in zip(PROMPTS, one_rank["rules"]["penalised"], strict=True):
        assert len({*prompt, *row}) == len({*prompt}) + len(row)


def test_no_query_is_left_without_a_key():
    """A softmax over nothing is NaN in some kernels. Rows of 3 and of 1 token; then one more slot."""
    first = torch.tensor([0, 2])
    prefill, step = hidden_slots(torch.arange(3), first), hidden_slots(torch.tensor([3]), first)
    assert (~prefill).int()[:, 0].tolist() == [
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]],
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    ]
    assert (~step).int().flatten(1).tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]


def test_what_cannot_be_continued_is_refused(one_rank: dict[str, Any]):
    empty, long, foreign, none = one_rank["rules"]["refused"]
    assert empty.startswith("ValueError: prompt 1 has no token")
    assert long.startswith("ValueError: prompt 0 has 32 tokens, but the context holds 32")
    assert foreign.startswith("ValueError: prompt 0 has tokens 1..120, but the vocabulary is 0..119")
    assert none == "ConfigError: max_new_tokens is 0: it must be at least 1"


def test_first_tokens_are_drawn_from_the_softmax_of_the_recomputed_logits(one_rank: dict[str, Any]):
    """V5 through the whole path: 4000 draws against exact probabilities, chi-square."""
    expected = 4000 * one_rank["oracle"]["dense"]["logits"][2, 0].double().softmax(-1)
    draws = torch.tensor(one_rank["rules"]["draws"]).flatten()
    counts, common = torch.bincount(draws, minlength=VOCAB), expected >= 5
    cells = [*zip(counts[common].tolist(), expected[common].tolist(), strict=True)]
    cells.append((int(counts[~common].sum()), float(expected[~common].sum())))
    statistic = torch.tensor(sum((n - mean) ** 2 / mean for n, mean in cells) / 2, dtype=torch.float64)
    half_freedom = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    assert torch.special.gammaincc(half_freedom, statistic) > 1e-3

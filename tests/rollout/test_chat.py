"""A chat over two ranks: rank 0 has the terminal, and what it streams is what `answer` gives."""

from __future__ import annotations

from typing import Any

import chat_checks
import pytest
from ranks import run_ranks


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """Two pipeline stages: the rank that speaks has no logits."""
    return run_ranks(chat_checks.talks, 2, {"pipeline_model_parallel_size": 2})


def test_the_conversation_streams_what_answer_gives(ranks: list[dict[str, Any]]):
    first, second = ranks[0]["expected turns"]
    cut = f"\n[cut after {chat_checks.TOKENS} tokens]\n"
    assert first and second and first != second
    assert "".join(ranks[0]["turns"]) == first + cut + second + cut
    assert len(ranks[0]["turns"]) > 8  # piece by piece


def test_piped_lines_and_a_single_prompt(ranks: list[dict[str, Any]]):
    replies = ranks[0]["one by one"]
    assert "".join(ranks[0]["piped"]) == "".join(reply.replace("\n", "\\n") + "\n" for reply in replies[:2])
    assert "".join(ranks[0]["once"]) == replies[2] + "\n"


def test_the_other_rank_is_silent(ranks: list[dict[str, Any]]):
    assert not any(ranks[1][talk] for talk in ("turns", "piped", "once", "interrupted", "too long"))


def test_control_c_on_all_ranks_ends_the_chat_on_all(ranks: list[dict[str, Any]]):
    """Both ranks came back (they went on to other talks), soon after the third piece."""
    assert 3 <= len(ranks[0]["interrupted"]) <= 6
    assert all(rank["restored"] for rank in ranks)


def test_an_error_of_rank_0_lets_the_others_go(ranks: list[dict[str, Any]]):
    assert "the context holds 256" in ranks[0]["too long"]


def test_answers_come_in_order_and_alike_on_every_rank(ranks: list[dict[str, Any]]):
    """In batches sorted by length; "" for the conversation that leaves no room."""
    assert ranks[0]["batched"] == [*ranks[0]["one by one"], ""]
    assert ranks[1]["batched"] == ranks[0]["batched"]
    assert len(set(ranks[0]["one by one"])) == len(chat_checks.QUESTIONS) - 1

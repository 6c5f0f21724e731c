"""What an evaluation says of the answers it draws (`train.eval_prompts`), from answers that are given here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megalign.data.rows import Conversation, Message
from megalign.trainer import finish

REFERENCES, ANSWERS = ["tea at noon", " by the mill ", "owl", "fox"], ["tea at noon\n", "by the mill", "Owl", "fox"]


def test_share_of_exact_answers_and_their_mean_length(monkeypatch: pytest.MonkeyPatch):
    """White space at the ends does not count, letters do; only as many prompts as are asked for."""
    rows = [Conversation((Message("user", "?"), Message("assistant", text))) for text in REFERENCES]
    pairs = list(zip(rows, ANSWERS, strict=True))
    monkeypatch.setattr(finish, "reply", lambda engine, run, data, count: pairs[:count])

    def metrics(count: int) -> dict[str, float]:
        run: Any = SimpleNamespace(recipe=SimpleNamespace(train=SimpleNamespace(eval_prompts=count)))
        nothing: Any = None
        return finish.generation_metrics(nothing, run, nothing)

    assert metrics(3) == {"exact_match": 2 / 3, "response_characters": (12 + 11 + 3) / 3}
    assert metrics(4) == {"exact_match": 3 / 4, "response_characters": (12 + 11 + 3 + 3) / 4}
    assert metrics(0) == {}

"""Phases on CUDA's time line: what `logging.nvtx` tells Nsight, with torch's two calls noted instead of made."""

from __future__ import annotations

import pytest
import torch

from megalign.trainer.phases import MegatronTimers, Phases


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    told: list[str] = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", told.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: told.append("end"))
    return told


def test_ranges_nest_as_phases_do_and_an_error_leaves_none_open(told: list[str]):
    phases = Phases(nvtx=True)
    timers = MegatronTimers(phases)
    with phases("eval"):
        timers("forward-compute", log_level=2).start()
        timers("forward-compute", log_level=2).stop()
        timers("forward-recv", log_level=2).start()  # no phase of ours
        timers("forward-recv", log_level=2).stop()
    with pytest.raises(ValueError), phases("data"):
        phases.begin("forward")
        raise ValueError
    assert told == ["eval", "forward", "end", "end", "data", "forward", "end", "end"]


def test_without_the_key_nothing_is_told(told: list[str]):
    with Phases()("data"):
        pass
    assert told == []

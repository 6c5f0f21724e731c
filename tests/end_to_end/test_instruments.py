"""Timers name the slow rank, a profile is a trace a rank, running out of memory says where and what to try."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import instrument_checks
import pytest
from ranks import run_ranks
from sft_checks import metrics, recipe

SLEEP = 0.08
STEPS, MICROBATCHES = 12, 4


def test_a_slow_rank_is_named_and_steps_are_traced(tmp_path: Path):
    """Two tensor-parallel ranks: the fast one waits in all-reduces, and its steps last as long as those of the slow one."""
    two = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    train = {"max_steps": STEPS, "eval_interval": 6, "save_interval": 6}
    slow = recipe(tmp_path / "slow", parallel=two, train=train, logging={"timers": True, "profile_steps": [3, 4], "report": True})
    greedy = recipe(tmp_path / "greedy", parallel=two, logging={"memory_snapshot": True})
    first, second = run_ranks(instrument_checks.all_of_them, 2, slow, greedy)
    assert first[0] == second[0] == ""

    folder = tmp_path / "slow"
    rows = metrics(folder, "timers")
    assert [row["step"] for row in rows] == [10, STEPS]
    whole = rows[0]
    ranks = whole["ranks"]
    assert whole["slowest"] == 1 and [rank["rank"] for rank in ranks] == [0, 1]
    slept = MICROBATCHES * SLEEP
    assert ranks[1]["work"] - ranks[0]["work"] == pytest.approx(slept, rel=0.35), "waiting counts as work, or work as waiting"
    assert ranks[0]["step"] == pytest.approx(ranks[1]["step"], rel=0.1)
    assert whole["times_median"] == pytest.approx(ranks[1]["work"] / ranks[0]["work"], rel=0.01)
    assert ranks[1]["forward"] > slept
    for rank in ranks:
        parts = [rank[name] for name in ("data", "forward", "backward", "gradients", "optimizer")]
        assert all(part > 0 for part in parts) and 0.5 * rank["step"] < sum(parts) <= rank["step"]
        assert rank["eval"] > 0 and rank["checkpoint"] > 0
    events = {row["event"]: row["message"] for row in metrics(folder, "event")}
    assert events["straggler"].startswith("slowest rank 1 (host ") and "times the median" in events["timers"]
    assert statistics.median(row["step_time"] for row in metrics(folder)) > slept
    assert "slowest rank 1" in (folder / "report.html").read_text()

    for rank in range(2):
        trace = json.loads((folder / "logs" / "profile" / f"rank_{rank:05d}.json").read_text())
        names = [event.get("name") for event in trace["traceEvents"]]
        assert names.count("optimizer") == 2 and names.count("forward") == names.count("backward") == 2 * MICROBATCHES
        assert any("mm" in str(name) for name in names)

    for rank, (message, snapshots) in enumerate((first[1], second[1])):
        file = tmp_path / "greedy" / "logs" / "memory" / f"rank_{rank:05d}.pickle"
        assert message.startswith(f"TrainingStopped: training stopped at step 3: rank {rank} ran out of memory in forward: CUDA out of memory. Tried to allocate 2.00 GiB.; lower train.micro_batch_size")
        assert str(file) in message and snapshots == ["history of 100000", str(file)]
    stop = metrics(tmp_path / "greedy", "event")[-1]
    assert stop["event"] == "stop" and stop["step"] == 3 and "rank 0 ran out of memory" in stop["message"]

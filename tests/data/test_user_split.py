"""R12: a split by users and time leaks neither, and says what it leaves out; a time becomes yes, no or unknown."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalign.config.schema import HeadConfig
from megalign.data.judgements import as_judgements, came_within, labels_of
from megalign.data.labels import read_labels
from megalign.data.rows import BadRow, DataError, Message, Response, ScoredResponse
from megalign.data.user_split import DAY, described, seconds, split_by_user_and_time, split_file


def log(count: int = 2000, users: int = 100) -> tuple[list[str], list[float]]:
    numbers = np.random.default_rng(0)
    return [f"u{n}" for n in numbers.integers(0, users, count)], (numbers.random(count) * 60 * DAY).tolist()


def test_no_user_and_no_day_is_on_both_sides():
    users, times = log()
    found = split_by_user_and_time(users, times, share=0.25, horizon=7 * DAY)
    trained, held = {users[n] for n in found.train}, {users[n] for n in found.validation}
    assert trained and held and not trained & held and 15 <= found.held_out_users <= 35
    assert max(times[n] for n in found.train) + 7 * DAY <= found.cut <= min(times[n] for n in found.validation)
    assert found.cut == pytest.approx(np.quantile(times, 0.75))
    assert len(found.train) + len(found.validation) + sum(found.left_out.values()) == len(users) and all(found.left_out.values())


def test_a_file_that_grows_keeps_its_users_apart():
    users, times = log()
    few, more = (split_by_user_and_time(users[:stop], times[:stop], share=0.25, cut=30 * DAY) for stop in (1000, 2000))
    assert {users[n] for n in few.validation} <= {users[n] for n in more.validation}
    assert set(few.train) <= set(more.train) and set(few.validation) <= set(more.validation)
    other = split_by_user_and_time(users, times, share=0.25, cut=30 * DAY, seed=1)
    assert {users[n] for n in other.validation} != {users[n] for n in more.validation}


def row(user: Any, time: Any) -> str:
    return json.dumps({"prompt": "Q", "completion": "A", "user": user, "time": time, "labels": {"gap": {"time": 1.0}}}) + "\n"


def test_files(tmp_path: Path):
    file = tmp_path / "log.jsonl"
    file.write_text("".join(row({"id": f"u{n % 20}", "tenure": n}, f"2026-01-{1 + n // 8:02d}T00:00:00Z") for n in range(200)))
    found = split_file(file, tmp_path / "split", share=0.3, cut="2026-01-18", horizon_days=7)
    kept = {name: [json.loads(line) for line in (tmp_path / "split" / f"{name}.jsonl").read_text().splitlines()] for name in ("train", "validation")}
    assert len(kept["train"]) == len(found.train) and len(kept["validation"]) == len(found.validation)
    assert max(line["time"] for line in kept["train"]) == "2026-01-11T00:00:00Z" and min(line["time"] for line in kept["validation"]) == "2026-01-18T00:00:00Z"
    assert "cut at 2026-01-18T00:00+00:00" in described(found) and "labels from behind the cut" in described(found)
    from typer.testing import CliRunner

    from megalign.cli import app

    done = CliRunner().invoke(app, ["rm", "split", str(file), str(tmp_path / "again"), "--share", "0.3", "--cut", "2026-01-18", "--horizon", "7"])
    assert done.exit_code == 0 and described(found) in done.stdout.replace("\n", " ")
    assert (tmp_path / "again" / "train.jsonl").read_bytes() == (tmp_path / "split" / "train.jsonl").read_bytes()
    with pytest.raises(DataError, match="exists: choose another folder"):
        split_file(file, tmp_path / "split", share=0.3)
    for lines, options, message in (
        (row(None, 1), {}, "line 1: needs 'user'"),
        (row("u", None), {}, "line 1: needs 'user'"),
        (row("u", "soon"), {}, "time is 'soon': give seconds since 1970, or a date"),
        ("[1]\n", {}, "no JSON object"),
        ("{\n", {}, "not JSON"),
        ("", {}, "holds no rows"),
        (row("u", 1), {"share": 1.0}, "--share is 1"),
        (row("u", 1) + row("v", 2), {"cut": "0"}, "no training row is left|no validation row is left"),
    ):
        file.write_text(lines)
        with pytest.raises(DataError, match=message):
            split_file(file, tmp_path / "no", **{"share": 0.2, **options})
    assert seconds("1970-01-02", "x") == seconds("1970-01-02T01:00:00+01:00", "x") == seconds(86400, "x") == DAY


def test_a_time_becomes_yes_no_or_unknown():
    """Come by then; not come by then, whether it came later or not; nobody looked that long."""
    assert [came_within(1.0, True, 1.0), came_within(1.5, True, 1.0), came_within(2.0, False, 1.0), came_within(1.0, False, 7.0)][:3] == [1.0, 0.0, 0.0]
    assert math.isnan(came_within(1.0, False, 7.0)) and math.isnan(came_within(math.nan, True, 7.0))
    heads = {name: HeadConfig(loss="binary", label="gap", within=days) for name, days in (("day", 1.0), ("week", 7.0))}

    def judged(**labels: Any) -> Any:
        return as_judgements(ScoredResponse((Message("user", "Q"),), Response((Message("assistant", "A"),)), read_labels(labels)), heads)[0]

    late = judged(gap={"time": 3.0, "observed": False})
    assert [labels_of(late, name, head)[0][0] for name, head in heads.items()] == [0.0, pytest.approx(math.nan, nan_ok=True)]
    wrong = judged(gap={"time": -3.0})
    assert isinstance(wrong, BadRow) and "takes times above 0 (within is given)" in wrong.reason

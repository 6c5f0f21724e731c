"""A split that a predictor of what users do can be judged on: other users, and later.

    validation: held-out users from the cut on;   training: the other users, up to `horizon` before the cut

A model that has seen a user, or the weeks it is asked about, can be right for reasons that are gone when it is used. What is
known of a training row was known `horizon` after it: with the horizon no label comes from behind the cut. All else is left out,
and counted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from megalign.data.files import json_values
from megalign.data.labels import read_user
from megalign.data.rows import DataError, Unusable

DAY = 86400.0


@dataclass(frozen=True)
class UserSplit:
    """Row numbers. cut: seconds since 1970."""

    train: list[int]
    validation: list[int]
    cut: float
    held_out_users: int
    left_out: dict[str, int]  # why: rows


def split_by_user_and_time(users: Sequence[str], times: Sequence[float], *, share: float, cut: float | None = None, horizon: float = 0.0, seed: int = 0) -> UserSplit:
    """users, times (seconds) of each row. share: of users held out. cut: default, after a share 1 - `share` of the rows. horizon: seconds.

    A user is held out by a hash of seed and name, so that a file that grows keeps its split. Raises DataError for an empty part.
    """
    at = np.asarray(times, np.float64)
    cut = float(np.quantile(at, 1 - share)) if cut is None else cut
    held = {user for user in set(users) if _fraction(f"{seed}/{user}") < share}
    train, validation, left = [], [], {"held-out users before the cut": 0, "other users after the cut": 0, "labels from behind the cut": 0}
    for number, (user, when) in enumerate(zip(users, at.tolist(), strict=True)):
        if user in held and when >= cut:
            validation.append(number)
        elif user in held:
            left["held-out users before the cut"] += 1
        elif when >= cut:
            left["other users after the cut"] += 1
        elif when + horizon > cut:
            left["labels from behind the cut"] += 1
        else:
            train.append(number)
    for name, part in (("training", train), ("validation", validation)):
        if not part:
            raise DataError(f"no {name} row is left: {len(held)} of {len(set(users))} users held out, cut at {_date(cut)}; {left}; choose another --share or --cut")
    return UserSplit(train, validation, cut, len(held), left)


def split_file(path: Path, folder: Path, *, share: float, cut: str | None = None, horizon_days: float = 0.0, seed: int = 0) -> UserSplit:
    """Write `train.jsonl` and `validation.jsonl` of a file whose rows have `user` and `time`.

    Raises DataError for a row without them, a share that is none, a folder that has such files.
    """
    if not 0 < share < 1:
        raise DataError(f"--share is {share:g}: it is a share of the users, above 0 and below 1")
    rows = list(_rows(path))
    if not rows:
        raise DataError(f"{path} holds no rows")
    found = split_by_user_and_time(
        [user for _, user, _ in rows], [time for _, _, time in rows], share=share, cut=None if cut is None else seconds(cut, "--cut"), horizon=horizon_days * DAY, seed=seed
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", found.train), ("validation", found.validation)):
        target = folder / f"{name}.jsonl"
        if target.exists():
            raise DataError(f"{target} exists: choose another folder, or remove it")
        target.write_text("".join(json.dumps(rows[number][0], ensure_ascii=False) + "\n" for number in part), encoding="utf-8")
    return found


def described(found: UserSplit) -> str:
    """In a line."""
    left = ", ".join(f"{count} {why}" for why, count in found.left_out.items() if count)
    return (
        f"cut at {_date(found.cut)}; {found.held_out_users} users held out; training {len(found.train)} rows, validation {len(found.validation)}"
        f"{f'; left out: {left}' if left else ''}"
    )


def seconds(value: Any, what: str) -> float:
    """Since 1970, of a number or an ISO 8601 date (without a zone: UTC). Raises DataError."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    with contextlib.suppress(ValueError):
        if math.isfinite(number := float(str(value))):
            return number
    try:
        when = datetime.fromisoformat(str(value).replace("Z", "+00:00"))
    except ValueError:
        raise DataError(f"{what} is {repr(value)[:40]}: give seconds since 1970, or a date like 2026-01-31T12:00:00Z") from None
    return (when if when.tzinfo else when.replace(tzinfo=timezone.utc)).timestamp()


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], str, float]]:
    for line, value in json_values(path):
        if isinstance(value, Unusable) or not isinstance(value, dict):
            raise DataError(f"{path}, line {line}: {value if isinstance(value, Unusable) else 'no JSON object'}")
        user, _ = read_user(value.get("user"))
        if user is None or value.get("time") is None:
            raise DataError(f"{path}, line {line}: needs 'user' (an id, or an object with one) and 'time' to be split by users and time")
        yield value, user, seconds(value["time"], f"{path}, line {line}: time")


def _fraction(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") / 2**56


def _date(cut: float) -> str:
    return datetime.fromtimestamp(cut, timezone.utc).isoformat(timespec="minutes")

"""What stands in a cache folder, and removing what has not been used for longest.

An entry's last use is the time of its folder, which every run that opens it renews. Nothing is removed while it may
be in use: not what was used within the last `unused_hours`, not what is being made (a lock beside it).
"""

from __future__ import annotations

import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from megalign.data.rows import DataError

UNUSED_HOURS = 24.0
_ENTRY = re.compile(r"(tokens|packs|window|digest)-[0-9a-f]{32}")  # kinds of `cache.entry_key` and `source`


@dataclass(frozen=True)
class Entry:
    """One entry: `bytes` on disk, `used` seconds since the epoch, `busy` if a process is making it."""

    path: Path
    bytes: int
    used: float
    busy: bool


def entries(folder: Path) -> list[Entry]:
    """All entries of a cache and what killed processes left half-made, the longest unused first. DataError for another folder."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no folder; a cache is data.cache_dir, or .cache beside the run folders")
    found = []
    locked = {path.name.partition(".lock-")[0] for path in folder.glob("*.lock-*")}
    for path in folder.iterdir():
        key, _, rest = path.name.partition(".")
        if path.is_dir() and _ENTRY.fullmatch(key) and (not rest or rest.startswith("part-")):
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            found.append(Entry(path, size, path.stat().st_mtime, key in locked))
    return sorted(found, key=lambda entry: entry.used)


def prune(folder: Path, limit: int, unused_hours: float = UNUSED_HOURS) -> tuple[list[Entry], list[Entry]]:
    """Remove entries, the longest unused first, until the rest takes at most `limit` bytes; return (removed, left).

    More than `limit` is left where the rest was used within `unused_hours` or is being made.
    """
    left = entries(folder)
    total, removed = sum(entry.bytes for entry in left), []
    for entry in list(left):
        if total <= limit:
            break
        if entry.busy or time.time() - entry.used < unused_hours * 3600:
            continue
        # First out of the way under another name: who looks for the entry finds all of it or nothing.
        aside = entry.path.with_name(f"{entry.path.name.partition('.')[0]}.part-pruned{os.getpid()}")
        entry.path.rename(aside)
        shutil.rmtree(aside)
        left.remove(entry)
        removed.append(entry)
        total -= entry.bytes
    return removed, left


def bytes_of(text: str) -> int:
    """"20GB", "500 MB", "0": decimal units. DataError for anything else."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*([kMGT]?)B?\s*", text)
    try:
        assert found is not None
        return int(float(found[1]) * 1000 ** " kMGT".index(found[2] or " "))
    except (AssertionError, ValueError):
        raise DataError(f"{text!r} is no size; give e.g. 20GB") from None


def show(folder: Path, limit: str | None, unused_hours: float) -> None:
    """The command `megalign data cache`: list, or prune to `limit`."""
    if limit is not None:
        removed, left = prune(folder, bytes_of(limit), unused_hours)
        for entry in removed:
            print(f"removed {_line(entry)}")
        total = sum(entry.bytes for entry in left)
        print(f"{len(removed)} entries removed, {len(left)} left with {total / 1e9:.3f} GB")
        if total > bytes_of(limit):
            print(f"more than {limit} is left: it is being made, or was used within {unused_hours:g} hours (--unused-hours)")
        return
    left = entries(folder)
    for entry in left:
        print(_line(entry))
    print(f"{len(left)} entries, {sum(entry.bytes for entry in left) / 1e9:.3f} GB; the longest unused first")


def _line(entry: Entry) -> str:
    hours = max(0.0, time.time() - entry.used) / 3600
    return f"{entry.path.name:40} {entry.bytes / 1e6:12,.1f} MB  unused for {hours:,.1f} h" + ("  being made" if entry.busy else "")

"""Entries leave the cache by their last use, and never while they may be in use."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megalign.cli import app
from megalign.config.schema import Recipe
from megalign.data.dataset import build_datasets
from megalign.data.prune import bytes_of, entries, prune
from megalign.data.rows import DataError

HOUR = 3600.0


def made(folder: Path, number: int, *, hours: float, size: int = 1000, suffix: str = "") -> Path:
    """An entry of `size` bytes used `hours` ago."""
    path = folder / f"tokens-{number:032x}{suffix}"
    path.mkdir(parents=True)
    (path / "tokens.bin").write_bytes(bytes(size))
    os.utime(path, (then := time.time() - hours * HOUR, then))
    return path


def test_the_longest_unused_go_first(tmp_path: Path):
    paths = [made(tmp_path, n, hours=hours) for n, hours in enumerate([50, 90, 30, 70])]
    (tmp_path / "notes").mkdir()  # not ours
    removed, left = prune(tmp_path, 2000)
    assert [entry.path for entry in removed] == [paths[1], paths[3]]
    assert [entry.path for entry in left] == [paths[0], paths[2]]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([paths[0].name, paths[2].name, "notes"])
    assert prune(tmp_path, 2000) == ([], left)


def test_what_may_be_in_use_stays(tmp_path: Path):
    recent, making = made(tmp_path, 1, hours=5), made(tmp_path, 2, hours=100, suffix=".part-abc")
    (tmp_path / f"tokens-{2:032x}.lock-1").mkdir()
    orphan = made(tmp_path, 3, hours=100, suffix=".part-def")  # of a process that was killed
    removed, left = prune(tmp_path, 0)
    assert [entry.path for entry in removed] == [orphan] and {entry.path for entry in left} == {recent, making}
    assert recent.is_dir() and making.is_dir()
    assert [entry.path for entry in prune(tmp_path, 0, unused_hours=4)[0]] == [recent]


def test_a_run_renews_what_it_uses_and_makes_again_what_is_gone(tmp_path: Path):
    data = {"train": "grammar", "max_rows": 20, "validation_rows": 0, "cache_dir": str(tmp_path / "c"), "sequence_length": 256}
    recipe = Recipe.model_validate({"data": {**data, "tokenizer": {"vocab_size": 300}}})
    first, _ = build_datasets(recipe)
    for entry in entries(tmp_path / "c"):
        os.utime(entry.path, (then := time.time() - 100 * HOUR, then))
    build_datasets(recipe)
    used = entries(tmp_path / "c")
    assert used and all(time.time() - entry.used < HOUR for entry in used)
    assert prune(tmp_path / "c", 0, unused_hours=0)[1] == []
    assert build_datasets(recipe)[0].statistics == first.statistics


def test_the_command(tmp_path: Path):
    made(tmp_path, 1, hours=100, size=5_000_000)
    made(tmp_path, 2, hours=1, size=3_000_000)
    listed = CliRunner().invoke(app, ["data", "cache", str(tmp_path)]).output
    assert "2 entries, 0.008 GB" in listed and "unused for 100.0 h" in listed
    pruned = CliRunner().invoke(app, ["data", "cache", str(tmp_path), "--prune", "1MB"]).output
    assert "1 entries removed, 1 left with 0.003 GB" in pruned and "more than 1MB is left" in pruned
    assert [entry.bytes for entry in entries(tmp_path)] == [3_000_000]


def test_sizes(tmp_path: Path):
    assert [bytes_of(text) for text in ("0", "20GB", "1.5 MB", "7k", "2T")] == [0, 20 * 10**9, 1_500_000, 7000, 2 * 10**12]
    for wrong in ("", "many", "5XB", "1.2.3GB"):
        with pytest.raises(DataError, match="no size"):
            bytes_of(wrong)
    with pytest.raises(DataError, match="no folder"):
        entries(tmp_path / "nowhere")

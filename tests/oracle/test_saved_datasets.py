"""Folders that the `datasets` library itself saves are read row for row, with splits and shards."""

from __future__ import annotations

import json

import pytest

from megalign.data.formats import detect, read_rows
from megalign.data.rows import Conversation

pytestmark = pytest.mark.oracle


def test_folders_that_datasets_saves(tmp_path):
    from datasets import Dataset, DatasetDict  # pyright: ignore[reportMissingImports] (of the oracle extra)

    rows = [{"messages": [{"role": "user", "content": f"Hi {n}"}, {"role": "assistant", "content": "Yo"}]} for n in range(50)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    wanted = [row.messages for row in read_rows(tmp_path / "a.jsonl") if isinstance(row, Conversation)]
    saved = Dataset.from_json(str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "cache"))
    saved.save_to_disk(str(tmp_path / "plain"), num_shards=3)
    DatasetDict({"train": saved, "test": saved}).save_to_disk(str(tmp_path / "splits"))
    for folder in ("plain", "splits", "splits/test"):
        assert detect(tmp_path / folder) == "messages"
        assert [row.messages for row in read_rows(tmp_path / folder) if isinstance(row, Conversation)] == wanted

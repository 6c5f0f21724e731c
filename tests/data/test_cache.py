"""Tokens on disk are the tokens of `encode`; what they depend on is in their name; memory holds a window of them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from itertools import chain, count
from pathlib import Path

import numpy as np
import pytest

from megalign.config.schema import DataConfig, Recipe
from megalign.data import cache, packs
from megalign.data.cache import Encoded, Mapped, write_encoded
from megalign.data.dataset import build_datasets
from megalign.data.encode import encode_rows, plain_texts, split_document
from megalign.data.formats import read_rows
from megalign.data.packing import pack
from megalign.data.rows import BadRow, DataError, TextRow
from megalign.data.tokenizer import train_tokenizer


def chat(n: int) -> str:
    turns = [{"role": "user", "content": f"{n} + 1?"}, {"role": "assistant", "content": f"It is {n + 1}." * (1 + n % 3)}]
    return json.dumps({"messages": turns})


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Conversations with two bad rows among them, and text, one paragraph longer than a pack."""
    lines = [chat(n) for n in range(60)]
    lines.insert(3, "{")
    lines.insert(40, chat(1).replace("assistant", "nobody"))
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.txt").write_text("\n\n".join(f"Owl {n} sleeps. " * (1 + 9 * (n % 4)) for n in range(30)))
    return [str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt")]


def recipe_of(train, folder: Path | None = None, **data) -> Recipe:
    values = {"train": train, "validation_rows": 0, "sequence_length": 64, "max_bad_share": 0.1, "tokenizer": {"vocab_size": 300}}
    return Recipe.model_validate({"data": values | ({"cache_dir": str(folder)} if folder else {}) | data})


@pytest.mark.parametrize("packing", [True, False])
def test_packs_are_those_of_rows_encoded_in_memory(files: list[str], packing: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache, "BLOCK_ROWS", 7)
    monkeypatch.setattr(cache, "RESIDENT", 1)  # every read gives the pages back
    train, _ = build_datasets(recipe_of(files, packing=packing))
    examples = []
    for row in chain(*(read_rows(path) for path in files)):
        result = next(encode_rows([row], train.tokenizer, max_length=64))
        if not isinstance(result, BadRow):
            examples += split_document(result, 64) if isinstance(row, TextRow) else [result]
    room = [min(-(-len(example) // 8) * 8, 64) for example in examples]
    expected = [[examples[i] for i in group] for group in (pack(room, 64) if packing else [[i] for i in range(len(examples))])]
    assert len(train) == len(expected) > 10 and train.statistics["documents_split"] > 5
    for number, (found, wanted) in enumerate(zip(train.rows, expected)):
        assert [e.input_ids.tolist() for e in found] == [e.input_ids.tolist() for e in wanted]
        assert [e.loss_mask.tolist() for e in found] == [e.loss_mask.tolist() for e in wanted]
        assert [e.input_ids.dtype for e in found] == [np.int32] * len(found)
        assert train.tokens[number] == sum(map(len, wanted))
    assert [e.input_ids.tolist() for e in train.rows[-1]] == [e.input_ids.tolist() for e in expected[-1]]
    with pytest.raises(IndexError):
        train.rows[len(train)]


def test_windows_of_documents_lose_and_mix_nothing(files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def documents(folder: str) -> list:
        train, _ = build_datasets(recipe_of(files, tmp_path / folder))
        assert all(sum(map(len, group)) <= 64 for group in train.rows)
        return [e.input_ids.tolist() for group in train.rows for e in group]

    whole = documents("whole")
    monkeypatch.setattr(packs, "WINDOW", 13)
    windowed = documents("windowed")
    assert windowed != whole and sorted(windowed) == sorted(whole)


def entries(folder: Path, kind: str) -> set[str]:
    return {path.name for path in folder.glob(f"{kind}-*")}


def test_a_second_run_tokenises_nothing(files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first, _ = build_datasets(recipe_of(files, tmp_path / "c"))
    monkeypatch.setattr(cache, "encode_rows", None)
    again, _ = build_datasets(recipe_of(files, tmp_path / "c"))
    assert again.statistics == first.statistics
    assert [list(map(len, group)) for group in again.rows] == [list(map(len, group)) for group in first.rows]


def test_whatever_changes_the_tokens_is_another_key(files: list[str], tmp_path: Path):
    """Also one byte of the file with its size and its time as they were."""
    folder, path = tmp_path / "c", Path(files[0])
    build_datasets(recipe_of(files[0], folder))[0].tokenizer.save(tmp_path / "tokenizer")
    saved = {"tokenizer": {"path": str(tmp_path / "tokenizer")}}

    def keys(**data) -> set[str]:
        before = entries(folder, "tokens")
        build_datasets(recipe_of(files[0], folder, **saved | data))
        return entries(folder, "tokens") - before

    assert not keys()  # the tokenizer that was trained, and the same one loaded
    assert not keys(packing=False, shuffle=False, validation_rows=3, max_bad_share=0.5)  # other packs, the same tokens
    options = ({"loss_on": "all"}, {"sequence_length": 72}, {"truncation": "drop"}, {"max_rows": 50}, {"tokenizer": {"vocab_size": 262}})
    for data in options:
        assert len(keys(**data)) == 1, data
        assert not keys(**data)
    stat = path.stat()
    path.write_bytes(path.read_bytes().replace(b"It is 9.", b"It is 8."))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert len(keys()) == 1


def test_the_code_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch):
    before = cache.entry_key("tokens", content="x")
    monkeypatch.setattr(cache, "_code_version", lambda: "another")
    assert cache.entry_key("tokens", content="x") != before


def test_hash_of_a_large_file_is_remembered_until_it_is_written(files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from megalign.data import source

    monkeypatch.setattr(source, "LARGE", 0)
    monkeypatch.setattr(source, "SETTLED", 0.0)
    path, folder = Path(files[0]), tmp_path / "c"
    first = source.file_digest(path, folder)
    stat = path.stat()
    monkeypatch.setattr(source, "_hash_file", lambda path: "hashed again")
    assert source.file_digest(path, folder) == first
    path.write_bytes(path.read_bytes().replace(b"It is 9.", b"It is 8."))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert source.file_digest(path, folder) == "hashed again"


def test_keys_without_influence_exist():
    assert set(DataConfig.model_fields) >= cache.IRRELEVANT


def test_the_default_folder_is_beside_the_run():
    recipe = Recipe.model_validate({"output": "runs/a/b"})
    assert cache.cache_folder(recipe) == Path("runs/a/.cache").absolute()


def test_damage_is_seen(files: list[str], tmp_path: Path, tokenizer):
    write_encoded(tmp_path, read_rows(files[0]), tokenizer, DataConfig())
    (tmp_path / "mask.bin").write_bytes(b"\0")
    with pytest.raises(DataError, match="is damaged.*remove the folder"):
        Encoded(tmp_path)


def test_a_file_changed_below_a_run_is_seen(files: list[str]):
    train, _ = build_datasets(recipe_of(files[0]))
    lines = Path(files[0]).read_text().splitlines()
    Path(files[0]).write_text("\n".join(["{", *lines]))
    with pytest.raises(DataError, match="has changed since it was tokenised"):
        list(train.kept)


def test_kept_rows_skip_what_was_not_used(files: list[str]):
    train, validation = build_datasets(recipe_of(files[0], validation_rows=2))
    assert [row.line for row in train.kept] == [n for n in range(1, 61) if n not in (4, 41)]
    assert len(train.kept) == 58 and train.kept[3].line == 5
    assert [row.line for row in validation.kept] == [61, 62]


MEASURE = """
import json, resource, sys
from pathlib import Path
from megalign.config.schema import Recipe
from megalign.data.dataset import build_datasets
from megalign.data.deal import sampler_of

def through(path, streaming):
    data = {"train": path, "validation_rows": 0, "sequence_length": 2048, "cache_dir": sys.argv[2], "tokenizer": {"path": sys.argv[1]}}
    batch = {"global_batch_size": 8, "micro_batch_size": 8, "max_steps": 10}
    recipe = Recipe.model_validate({"data": {**data, "streaming": streaming, "shuffle_window": 1000}, "train": batch})
    train, _ = build_datasets(recipe)
    sampler, tokens = sampler_of(train, recipe), 0
    while True:
        (rows,) = sampler.next_step()
        if sampler.epoch:
            return tokens
        tokens += sum(len(example) for i in rows if i >= 0 for example in train.rows[i])

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
through(sys.argv[3], False), through(sys.argv[3], True)
before = peak()
cached = through(sys.argv[4], False)
after = peak()
streamed = through(sys.argv[4], True)
print(json.dumps({"cached_mb": after - before, "streamed_mb": peak() - before, "cached": cached, "streamed": streamed}))
"""


def generate_chats(path: Path, size: int) -> Path:
    """A JSONL file of at least `size` bytes, rows of some 3 KB: a question of 500, an answer of its own.

    Questions repeat so that tokenising (each text of a block once) does not take an hour at 2 GB; memory has to hold
    or not to hold their tokens as it would those of others.
    """
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(8, 12))) for _ in range(1000)]
    questions = [" ".join(draw.choices(words, k=280)) for _ in range(500)]
    written = 0
    with open(path, "w") as file:
        for number in count():
            if written >= size:
                return path
            turns = [("user", questions[number * 7 % 500]), ("assistant", f"{number} {questions[number % 500][:200]}")]
            written += file.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
    return path


def grown(tmp_path: Path, size: int, timeout: float) -> float:
    """MB by which the peak of a process rises when it trains on a file of `size` bytes, tokenised first and then streamed."""
    little, big = generate_chats(tmp_path / "little.jsonl", 2**20), generate_chats(tmp_path / "big.jsonl", size)
    texts = (text for row in read_rows(little) for text in plain_texts(row))
    train_tokenizer(texts, vocab_size=3000).save(tmp_path / "tokenizer")
    command = [sys.executable, "-c", MEASURE, tmp_path / "tokenizer", tmp_path / "c", little, big]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=timeout, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["cached"] == found["streamed"] > size / 20
    print(found)
    return found["streamed_mb"]


def test_memory_does_not_grow_with_the_file(tmp_path: Path):
    """Its tokens take more than the bound, so holding them, or mapping them without giving back, would show."""
    assert grown(tmp_path, 24 * 2**20, timeout=600) < 20


@pytest.mark.soak
def test_two_gigabytes_take_less_than_200_mb(tmp_path: Path):
    assert grown(tmp_path, 2 * 2**30, timeout=7200) < 200


def test_mapped_arrays(tmp_path: Path):
    values = np.arange(1000, dtype=np.int64)
    values.tofile(tmp_path / "a")
    mapped = Mapped(tmp_path / "a", np.int64)
    assert len(mapped) == 1000 and (mapped.read(10, 20) == values[10:20]).all()
    (tmp_path / "empty").write_bytes(b"")
    assert len(Mapped(tmp_path / "empty", np.int64)) == 0

"""A stream: every row once an epoch, shuffled within its window, on every layout and after every resume the same."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from megalign.config.schema import Recipe
from megalign.data import cache
from megalign.data.dataset import Dataset, build_datasets
from megalign.data.deal import distribution, sampler_of
from megalign.data.rows import DataError
from megalign.data.stream import PLACE, Stream

ROWS, WINDOW = 50, 8


@pytest.fixture
def recipe(tmp_path: Path, tokenizer) -> Recipe:
    """50 conversations in two files, each with a number of its own; windows of 8 rows, the last of 2."""
    tokenizer.save(tmp_path / "tokenizer")
    files = []
    for name, numbers in (("a", range(100, 130)), ("b", range(130, 150))):
        lines = [{"messages": [{"role": "user", "content": f"<{n}>"}, {"role": "assistant", "content": "ok " * (n % 7 + 1)}]} for n in numbers]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        files.append(str(tmp_path / f"{name}.jsonl"))
    data = {"train": files, "streaming": True, "shuffle_window": WINDOW, "validation_rows": 0, "sequence_length": 128, "packing": False,
            "tokenizer": {"path": str(tmp_path / "tokenizer")}}  # fmt: skip
    return Recipe.model_validate({"data": data, "train": {"global_batch_size": 4, "micro_batch_size": 1, "max_steps": 100}})


def numbers(dataset: Dataset, rows: list[int]) -> list[int]:
    """Which conversations stand in some packs."""
    text = "".join(dataset.tokenizer.decode(example.input_ids) for row in rows if row >= 0 for example in dataset.rows[row])
    return [int(part[:3]) for part in text.split("<1")[1:] for part in ["1" + part]]


def steps(dataset: Dataset, recipe: Recipe, count: int, ranks: int = 1) -> list[list[list[int]]]:
    """[step][rank] conversations."""
    samplers = [sampler_of(dataset, recipe, data_parallel_rank=rank, data_parallel_size=ranks) for rank in range(ranks)]
    return [[numbers(dataset, list(chain(*sampler.next_step()))) for sampler in samplers] for _ in range(count)]


@pytest.mark.parametrize("packing", [False, True])
def test_an_epoch_is_every_row_once_within_its_window(recipe: Recipe, packing: bool):
    recipe.data.packing = packing
    train, _ = build_datasets(recipe)
    sampler = sampler_of(train, recipe)
    epochs: list[list[int]] = [[], [], []]
    while True:
        rows = list(chain(*sampler.next_step()))
        if sampler.epoch == 3:
            break
        epochs[sampler.epoch] += [row for row in rows if row >= 0]
    for epoch in epochs:
        assert [row // PLACE for row in epoch] == sorted(row // PLACE for row in epoch)
        seen = numbers(train, epoch)
        assert sorted(seen) == list(range(100, 150))
        windows = [(n - 100) // WINDOW for n in seen]
        assert windows == sorted(windows)
    assert len(set(map(tuple, epochs))) == 3 and (packing or numbers(train, epochs[0]) != sorted(numbers(train, epochs[0])))


def test_ranks_share_a_step_and_balance_keeps_its_rows(recipe: Recipe):
    train, _ = build_datasets(recipe)
    one, two, four = (steps(train, recipe, 30, ranks) for ranks in (1, 2, 4))
    recipe.data.balance = False
    plain = steps(train, recipe, 30, 2)
    for a, b, c, d in zip(one, two, four, plain):
        assert sorted(chain(*a)) == sorted(chain(*b)) == sorted(chain(*c)) == sorted(chain(*d))
        assert len(set(chain(*b))) == len(list(chain(*b)))
    assert two != plain


def test_a_resume_reads_on_exactly(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """After each of 30 steps (an epoch has 13), in new objects, with an empty cache and with a full one."""
    train, _ = build_datasets(recipe)
    whole = sampler_of(train, recipe)
    states, expected, progress = [], [], []
    for _ in range(40):
        states.append(json.loads(json.dumps(whole.state_dict())))
        expected.append(numbers(train, list(chain(*whole.next_step()))))
        progress.append(whole.progress)
    assert progress[0] == 0 and progress == sorted(progress) and progress[12] == 1
    for before in range(30):
        monkeypatch.setattr(cache, "encode_rows", cache.encode_rows)
        if before % 5 == 0:
            recipe.data.cache_dir = str(tmp_path / f"new{before}")
        again, _ = build_datasets(recipe)
        sampler = sampler_of(again, recipe)
        sampler.load_state_dict(states[before])
        for step in range(before, before + 8):
            assert numbers(again, list(chain(*sampler.next_step()))) == expected[step]
            assert sampler.progress == progress[step]


def test_a_window_is_tokenised_once(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    train, _ = build_datasets(recipe)
    steps(train, recipe, 14)
    windows = sorted(path.name for path in cache.cache_folder(recipe).glob("window-*"))
    assert len(windows) == 7
    monkeypatch.setattr(cache, "encode_rows", None)
    again, _ = build_datasets(recipe)
    assert steps(again, recipe, 30) == steps(train, recipe, 30)
    assert again.statistics["fingerprint"] == train.statistics["fingerprint"]


def test_another_window_or_file_is_another_stream(recipe: Recipe):
    train, _ = build_datasets(recipe)
    state = sampler_of(train, recipe).state_dict()
    recipe.data.shuffle_window = 9
    with pytest.raises(DataError, match="cannot resume: stream is"):
        sampler_of(build_datasets(recipe)[0], recipe).load_state_dict(state)
    recipe.data.shuffle_window = WINDOW
    path = Path(recipe.data.train[1])
    path.write_text(path.read_text().replace("<149>", "<148>"))
    assert build_datasets(recipe)[0].statistics["fingerprint"] != train.statistics["fingerprint"]


def test_few_windows_are_open_and_the_next_is_made_ahead(recipe: Recipe):
    train, _ = build_datasets(recipe)
    stream = train.rows
    assert isinstance(stream, Stream)
    stream._made[1].result()
    assert len(list(cache.cache_folder(recipe).glob("window-*"))) == 2
    for number in range(7):
        stream.window(number)
        assert len(stream._open) <= 3
    assert [stream.window(6).last, stream.window(5).last] == [True, False]


def test_whole_windows_end_with_an_empty_one(recipe: Recipe):
    recipe.data.max_rows = 16
    train, _ = build_datasets(recipe)
    sampler = sampler_of(train, recipe)
    rows = [list(chain(*sampler.next_step())) for _ in range(8)]
    assert sorted(numbers(train, list(chain(*rows[:4])))) == sorted(numbers(train, list(chain(*rows[4:])))) == list(range(100, 116))
    assert sampler.epoch == 1


def test_a_remainder_is_padded_or_dropped(recipe: Recipe):
    train, _ = build_datasets(recipe)
    sampler = sampler_of(train, recipe)
    rows = [list(chain(*sampler.next_step())) for _ in range(13)]
    assert sorted(rows[12])[:2] == [-1, -1] and sampler.epoch == 0
    recipe.data.remainder = "drop"
    sampler = sampler_of(train, recipe)
    rows = [list(chain(*sampler.next_step())) for _ in range(13)]
    assert sampler.epoch == 1 and -1 not in chain(*rows)
    recipe.train.global_batch_size = 64
    with pytest.raises(DataError, match="an epoch makes no batch of 64 rows"):
        sampler_of(train, recipe).next_step()


def test_bad_rows_stop_it_in_their_window(recipe: Recipe):
    path = Path(recipe.data.train[1])
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:12], "{", *lines[13:]]))
    train, _ = build_datasets(recipe)
    sampler = sampler_of(train, recipe)
    for _ in range(10):
        sampler.next_step()
    with pytest.raises(DataError, match="1 of 8 rows are unusable: 12.50%"):
        sampler.next_step()
    recipe.data.max_bad_share = 0.2
    assert sum(len(chain_) for step in steps(build_datasets(recipe)[0], recipe, 13) for chain_ in step) == 49


def test_statistics_speak_of_the_first_window(recipe: Recipe):
    train, validation = build_datasets(recipe)
    assert train.statistics["rows_kept"] == WINDOW == len(train) == len(train.kept)
    assert train.statistics["streaming"] == {"shuffle_window": WINDOW, "counts": "rows of the first window"}
    assert len(validation) == 0
    found = distribution(train, recipe, 2, padded=False)
    assert found["dealt"]["idle_share"] <= found["in_order"]["idle_share"]
    assert np.array_equal(train.tokens, train.rows.window(0).packs.tokens)  # type: ignore[union-attr]

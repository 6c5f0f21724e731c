"""Sources have the shares asked for at every moment, on every layout, and after every resume."""

from __future__ import annotations

import json
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalign.config.advice import warnings
from megalign.config.errors import ConfigError
from megalign.config.rules import check
from megalign.config.schema import CurriculumStage, Recipe
from megalign.data.dataset import PackRange, build_datasets
from megalign.data.deal import distribution, sampler_of
from megalign.data.mixture import MixtureSampler
from megalign.data.rows import DataError
from megalign.data.splits import shares_of

TOKENS = np.random.RandomState(1).randint(5, 100, 120)


def parts_of(*weights: float, sizes: tuple[int, ...] = (70, 40, 10)) -> list[PackRange]:
    ends = np.cumsum(sizes)
    return [PackRange("abc"[i], w / sum(weights), int(ends[i] - sizes[i]), int(ends[i])) for i, w in enumerate(weights)]


def sampler(parts: list[PackRange], rank: int = 0, ranks: int = 1, **options) -> MixtureSampler:
    values = {"global_batch_size": 8, "micro_batch_size": 2, "seed": 7, **options}
    return MixtureSampler(parts, TOKENS, data_parallel_rank=rank, data_parallel_size=ranks, **values)


def source_of(row: int, parts: list[PackRange]) -> int:
    return next(i for i, part in enumerate(parts) if part.start <= row < part.stop)


@given(st.tuples(*[st.integers(0, 20)] * 3).filter(any))
def test_shares_are_exact_to_a_row_of_each_source(weights: tuple[int, ...]):
    parts = parts_of(*weights)
    dealer, dealt = sampler(parts), np.zeros(3)
    for _ in range(40):
        for row in chain(*dealer.next_step()):
            dealt[source_of(row, parts)] += TOKENS[row]
        wanted = np.array([part.weight for part in parts]) * dealt.sum()
        assert np.abs(dealt - wanted).max() <= 2 * TOKENS.max()
    found = dealer.realised()
    assert [found[part.name]["share"] for part in parts] == pytest.approx((dealt / dealt.sum()).tolist())


def test_replay_has_its_share_of_rows_of_one_length():
    """D27: 10 % of equal rows are every tenth to within one row, at every step of the run."""
    parts, count = parts_of(9, 1, sizes=(70, 50)), 0
    dealer = MixtureSampler(parts, np.full(120, 32), global_batch_size=4, micro_batch_size=4, seed=1)
    for step in range(1, 200):
        count += sum(source_of(row, parts) == 1 for row in chain(*dealer.next_step()))
        assert abs(count - 0.1 * 4 * step) < 1


def test_a_source_is_gone_through_before_it_begins_again_in_another_order():
    parts = parts_of(1, 1, 2)
    dealer = sampler(parts)
    seen = [row for _ in range(30) for row in chain(*dealer.next_step())]
    last = [row for row in seen if row >= 110]
    assert sorted(last[:10]) == sorted(last[10:20]) == list(range(110, 120)) and last[:10] != last[10:20]
    assert dealer.realised()["c"]["passes"] == len(last) / 10


def test_layouts_and_resumes_deal_the_same():
    parts = parts_of(5, 3, 2)
    stages = [CurriculumStage(from_step=9, weights={"a": 1, "c": 1})]
    whole = sampler(parts, curriculum=stages)
    expected = [list(chain(*whole.next_step())) for _ in range(40)]
    for before in (0, 1, 8, 9, 15, 16, 33):
        first = [sampler(parts, rank, 2, curriculum=stages) for rank in range(2)]
        for _ in range(before):
            for one in first:
                one.next_step()
        assert first[0].state_dict() == first[1].state_dict()
        state = json.loads(json.dumps(first[0].state_dict()))
        resumed = [sampler(parts, rank, 4, curriculum=stages) for rank in range(4)]
        for one in resumed:
            one.load_state_dict(state)
        for step in expected[before:]:
            assert list(chain(*(chain(*column) for column in zip(*(one.next_step() for one in resumed))))) == step
        with pytest.raises(DataError, match="cannot resume: mixture is"):
            sampler(parts_of(5, 3, 2, sizes=(60, 50, 10))).load_state_dict(state)


def test_weights_change_at_their_step():
    parts = parts_of(1, 0, 0)
    stages = [CurriculumStage(from_step=3, weights={"b": 1.0}), CurriculumStage(from_step=5, weights={"b": 1, "c": 3})]
    dealer = sampler(parts, curriculum=stages)
    steps = [[source_of(row, parts) for row in chain(*dealer.next_step())] for _ in range(60)]
    assert set(chain(*steps[:3])) == {0} and set(chain(*steps[3:5])) == {1} and set(chain(*steps[5:])) == {1, 2}
    tokens = {i: 0 for i in range(3)}
    dealer = sampler(parts, curriculum=stages)
    for step in range(60):
        for row in chain(*dealer.next_step()):
            tokens[source_of(row, parts)] += int(TOKENS[row]) if step >= 5 else 0
    assert tokens[2] / (tokens[1] + tokens[2]) == pytest.approx(0.75, abs=0.01)


@given(st.integers(0, 200), st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_whole_shares(count: int, weights: list[int]):
    found = shares_of(count, [float(w) for w in weights])
    assert sum(found) == count
    assert all(abs(f - count * w / sum(weights)) < 1 for f, w in zip(found, weights))


def chats(path, count: int, word: str) -> str:
    lines = [{"messages": [{"role": "user", "content": f"{word} {n}"}, {"role": "assistant", "content": word * (1 + n % 5)}]} for n in range(count)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def mixed(tmp_path, **data) -> Recipe:
    sources = [
        {"name": "own", "path": chats(tmp_path / "a.jsonl", 50, "fox"), "weight": 3, "kind": "human"},
        {"name": "old", "path": chats(tmp_path / "b.jsonl", 30, "owl"), "weight": 1, "kind": "replay"},
    ]
    values = {"mixture": sources, "validation_rows": 8, "sequence_length": 64, "tokenizer": {"vocab_size": 300}, **data}
    return Recipe.model_validate({"data": values, "train": {"global_batch_size": 4, "micro_batch_size": 2}})


@pytest.mark.parametrize("packing", [True, False])
def test_from_files(tmp_path, packing: bool):
    recipe = mixed(tmp_path, packing=packing)
    train, validation = build_datasets(recipe)
    # 8 rows set apart, 6 of the source with weight 3/4 and 2 of the other.
    assert [row.source[-7:] for row in validation.kept] == ["a.jsonl"] * 6 + ["b.jsonl"] * 2
    assert train.statistics["rows_read"] == 44 + 28 and not validation.parts
    text = [train.tokenizer.decode(chain(*(e.input_ids for e in pack))) for pack in train.rows]
    own, old = train.parts
    assert all("fox" in text[i] and "owl" not in text[i] for i in range(own.start, own.stop))
    assert all("owl" in text[i] and "fox" not in text[i] for i in range(old.start, old.stop))
    dealer = sampler_of(train, recipe)
    assert isinstance(dealer, MixtureSampler) and not isinstance(sampler_of(validation, recipe, evaluation=True), MixtureSampler)
    for _ in range(30):
        dealer.next_step()
    assert dealer.realised()["old"]["share"] == pytest.approx(0.25, abs=0.02)
    assert "old 2" in dealer.describe()
    assert distribution(train, recipe, 2, padded=False)["dealt"]["padding_share"] == 0


def test_unusual_shares_are_warned_about():
    def told(**weights: float) -> list[str]:
        sources = [{"name": kind, "path": "x", "weight": weight, "kind": kind} for kind, weight in weights.items()]
        return [line for line in warnings(Recipe.model_validate({"data": {"mixture": sources}})) if line.startswith("data.mixture")]

    assert told(human=20, reviewed=15, synthetic=65) == []
    assert told(human=18, reviewed=18, synthetic=54, replay=10) == []
    assert told(human=30, reviewed=20, synthetic=50) == []
    assert told(human=40, reviewed=10, synthetic=50) == [
        "data.mixture: human data is 40% of the tokens that are human, reviewed or synthetic; 10% to 30% is usual"
    ]
    assert len(told(human=5, reviewed=5, synthetic=90)) == 3
    assert told(human=15, reviewed=12, synthetic=43, replay=30)[-1] == "data.mixture: replay data is 30% of all tokens; 5% to 20% is usual"


def test_impossible_mixtures():
    def problems(**data) -> str:
        with pytest.raises(ConfigError) as error:
            check(Recipe.model_validate({"data": data}))
        return str(error.value)

    a, b = {"name": "a", "path": "x", "weight": 1}, {"name": "b", "path": "y", "weight": 0}
    assert "two sources have one name" in problems(mixture=[a, a])
    assert "no source has a weight above 0" in problems(mixture=[b])
    assert "data.mixture takes its place" in problems(mixture=[a], train="z.jsonl")
    assert "there is none" in problems(curriculum=[{"from_step": 1, "weights": {"a": 1}}])
    assert "no source of data.mixture is called 'z'" in problems(mixture=[a], curriculum=[{"from_step": 1, "weights": {"z": 1}}])
    stages = [{"from_step": 5, "weights": {"a": 1}}, {"from_step": 1, "weights": {"b": 0}}]
    found = problems(mixture=[a, b], curriculum=stages)
    assert "not in the order of their steps" in found and "weights from step 1 on do not make shares" in found


def test_first_epoch_goes_from_short_to_long(tmp_path):
    path = chats(tmp_path / "a.jsonl", 50, "fox")
    values = {"train": path, "validation_rows": 0, "sequence_length": 64, "tokenizer": {"vocab_size": 262}, "order_by_length": True}
    for packing in (True, False):
        recipe = Recipe.model_validate({"data": {**values, "packing": packing}, "train": {"global_batch_size": 4}})
        train, _ = build_datasets(recipe)
        dealer = sampler_of(train, recipe)
        epochs = [[i for _ in range(dealer.steps_per_epoch) for i in chain(*dealer.next_step()) if i >= 0] for _ in range(2)]
        lengths = [[len(e) for i in epoch for e in train.rows[i]] for epoch in epochs]
        if packing:
            assert lengths[0] == sorted(lengths[0])
        else:  # within a step rows are regrouped
            steps = [lengths[0][i : i + 8] for i in range(0, 48, 8)]
            assert all(max(a) <= min(b) for a, b in zip(steps, steps[1:]))
        assert sorted(lengths[1]) == sorted(lengths[0]) and lengths[1] != lengths[0] and len(lengths[0]) == 50

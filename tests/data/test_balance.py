"""Even microbatches: the same rows, the same gradient, less waiting; and what the padding costs is counted right."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalign.data.balance import even_order, shares
from megalign.data.sampler import Sampler


@given(
    st.sampled_from([(1, 1, 4), (2, 1, 3), (2, 4, 2), (4, 2, 2), (8, 1, 1), (4, 1, 4)]),
    st.data(),
)
def test_a_permutation_whose_microbatches_do_not_depend_on_the_ranks(sizes: tuple[int, int, int], data: st.DataObject):
    ranks, micro, rounds = sizes
    tokens = np.array(data.draw(st.lists(st.integers(0, 50), min_size=ranks * micro * rounds, max_size=ranks * micro * rounds)))
    order = even_order(tokens, micro, ranks)
    assert sorted(order) == list(range(len(tokens)))

    def microbatches(count: int) -> list[tuple[int, ...]]:
        return sorted(map(tuple, even_order(tokens, micro, count).reshape(-1, micro).tolist()))

    assert microbatches(ranks) == microbatches(1)
    # Dealt heaviest first to the rank with the least: after each round no two ranks are further apart than one microbatch.
    per_round = tokens[order].reshape(rounds, ranks, micro).sum(axis=2).cumsum(axis=0)
    assert (per_round.max(axis=1) - per_round.min(axis=1) <= tokens[order].reshape(-1, micro).sum(axis=1).max()).all()


def test_by_hand():
    # Microbatches of 2: 10+1, 7+3, 6+5 (LPT: 10, 7, 6, then 5 to the 6, 3 to the 7, 1 to the 10).
    tokens = np.array([10, 7, 6, 5, 3, 1])
    groups = even_order(tokens, 2, 1).reshape(-1, 2)
    assert sorted(sorted(tokens[group].tolist()) for group in groups) == [[1, 10], [3, 7], [5, 6]]
    # Two ranks, one row a microbatch: 9 and 8, then 2 to the 8 and 1 to the 9; in order the sums are 17 and 3.
    tokens = np.array([9, 1, 8, 2])
    by_rank = tokens[even_order(tokens, 1, 2)].reshape(2, 2)
    assert sorted(by_rank.sum(axis=0)) == [10, 10]


def samplers(tokens: np.ndarray, ranks: int, micro: int = 1, **options) -> list[Sampler]:
    return [
        Sampler(
            len(tokens), global_batch_size=16, micro_batch_size=micro, data_parallel_rank=rank, data_parallel_size=ranks, tokens=tokens, seed=3, **options
        )
        for rank in range(ranks)
    ]


LENGTHS = np.random.RandomState(0).lognormal(5, 1, 200).astype(np.int64) + 1


@pytest.mark.parametrize("micro", [1, 2])
def test_the_global_batch_stays_and_the_waiting_goes(micro: int):
    dealt, plain = samplers(LENGTHS, 4, micro, balance=True), samplers(LENGTHS, 1, micro)[0]
    idle = {True: [], False: []}
    for _ in range(13):
        steps = [sampler.next_step() for sampler in dealt]
        rows = sorted(chain(*chain(*steps)))
        assert rows == sorted(chain(*plain.next_step()))
        sums = [sum(LENGTHS[i] for i in chain(*step) if i >= 0) for step in steps]
        idle[True].append(max(sums) - np.mean(sums))
    for rank_steps in (samplers(LENGTHS, 4, micro),):
        for _ in range(13):
            sums = [sum(LENGTHS[i] for i in chain(*sampler.next_step()) if i >= 0) for sampler in rank_steps]
            idle[False].append(max(sums) - np.mean(sums))
    assert sum(idle[True]) < 0.35 * sum(idle[False])


def test_resume_deals_the_same(tmp_path):
    one, two = samplers(LENGTHS, 2, balance=True)[1], samplers(LENGTHS, 2, balance=True)[1]
    for _ in range(5):
        one.next_step()
    two.load_state_dict(one.state_dict())
    assert [one.next_step() for _ in range(20)] == [two.next_step() for _ in range(20)]


def test_shares_by_hand():
    steps = [np.array([[[6], [2]], [[4], [4]]]), np.array([[[3], [0]]])]  # ranks: 6 + 4 and 2 + 4, then 3 and nothing
    # Filled 19 of 2 * 10 + 2 * 3 rank times; of 6 rows of 8 positions.
    assert shares(steps, 8, padded=False) == {"padding_share": 0.0, "idle_share": pytest.approx(1 - 19 / 26)}
    assert shares(steps, 8, padded=True) == {"padding_share": pytest.approx(1 - 19 / 48), "idle_share": 0.0}

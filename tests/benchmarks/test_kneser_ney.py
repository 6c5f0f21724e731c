"""The counting baseline against the textbook formula worked by hand, and against its published numbers."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest

from megalign.config.schema import Recipe
from megalign.data.rows import Example

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "baselines"))
import kneser_ney  # pyright: ignore[reportMissingImports]

A, B, C, D = range(4)


def example(ids: list[int], scored: list[int] | None = None) -> Example:
    mask = [0] + [1] * (len(ids) - 1) if scored is None else scored
    return Example(np.array(ids, dtype=np.int32), np.array(mask, dtype=bool))


def distribution(model, previous: int, vocab_size: int) -> np.ndarray:
    return kneser_ney.probability(model, np.full(vocab_size, previous), np.arange(vocab_size))


@pytest.fixture
def hand():
    """Transitions ab, ba, ab, ba, ac: c(a) = 3, c(b) = 2; a, b, c follow one token each; d is never seen."""
    return kneser_ney.fit([example([A, B, A, B, A, C])], vocab_size=4, discount=0.75)


def test_bigram_is_the_textbook_formula(hand):
    # q = (1 - .75)/3 + .75 * 3/3 * 1/4 = 13/48 for a, b, c and 9/48 for d; N(..) = 3 distinct pairs
    q = np.array([13, 13, 13, 9]) / 48
    # after a (3 times, 2 kinds): max(c - .75, 0)/3 + .75 * 2/3 q; after b (2 times, 1 kind): .../2 + .75 * 1/2 q
    after_a = np.array([0, 1.25, 0.25, 0]) / 3 + 0.5 * q
    after_b = np.array([1.25, 0, 0, 0]) / 2 + 0.375 * q
    np.testing.assert_allclose(after_a, np.array([13, 53, 21, 9]) / 96)
    np.testing.assert_allclose(distribution(hand, A, 4), after_a, rtol=1e-14)
    np.testing.assert_allclose(distribution(hand, B, 4), after_b, rtol=1e-14)


def test_after_a_token_never_seen_as_context_comes_the_continuation_probability(hand):
    np.testing.assert_allclose(distribution(hand, C, 4), np.array([13, 13, 13, 9]) / 48, rtol=1e-14)
    np.testing.assert_allclose(distribution(hand, D, 4), np.array([13, 13, 13, 9]) / 48, rtol=1e-14)


def test_unigram_is_discounted_frequency(hand):
    # targets b a b a c: (2 - .75)/5 + .75 * 3/5 * 1/4 = .3625; (1 - .75)/5 + .1125 = .1625; unseen .1125
    np.testing.assert_allclose(hand.unigram_V, [0.3625, 0.3625, 0.1625, 0.1125], rtol=1e-14)


def test_nll_is_the_mean_over_scored_tokens_only(hand):
    rows = [example([A, B, C], [0, 1, 0]), example([D, B, A, C, D], [0, 0, 0, 1, 1])]
    # scored: b after a, c after a, d after c
    want = -(math.log(53 / 96) + math.log(21 / 96) + math.log(9 / 48)) / 3
    assert kneser_ney.nll(hand, rows) == pytest.approx(want, rel=1e-14)
    want = -(math.log(0.3625) + math.log(0.1625) + math.log(0.1125)) / 3
    assert kneser_ney.unigram_nll(hand, rows) == pytest.approx(want, rel=1e-14)


def test_prompt_transitions_count_only_when_asked_and_rows_do_not_touch():
    rows = [example([A, B, C], [0, 0, 1]), example([A, B])]
    assert kneser_ney.fit(rows, 4).pairs_N.tolist() == [A * 4 + B, B * 4 + C]
    assert kneser_ney.fit(rows, 4).counts_N.tolist() == [1, 1]
    assert kneser_ney.fit(rows, 4, scored_only=False).counts_N.tolist() == [2, 1]  # and no pair c -> a


@pytest.mark.parametrize("discount", [0.1, 0.75, 0.99])
def test_every_distribution_sums_to_one(discount):
    rng = np.random.default_rng(0)
    rows = [example(rng.zipf(1.5, size=40).clip(max=49).tolist()) for _ in range(20)]  # ids 0 and 50.. unseen
    model = kneser_ney.fit(rows, vocab_size=60, discount=discount)
    sums = [distribution(model, previous, 60).sum() for previous in range(60)]
    np.testing.assert_allclose([*sums, model.unigram_V.sum()], 1, rtol=1e-12)
    assert min(distribution(model, previous, 60).min() for previous in range(60)) > 0


def test_refusals_say_the_fix():
    with pytest.raises(ValueError, match="vocab_size is 3, but the rows hold id 3; raise it to 4"):
        kneser_ney.fit([example([A, D])], vocab_size=3)
    with pytest.raises(ValueError, match="discount is 1, but must lie between"):
        kneser_ney.fit([example([A, D])], vocab_size=4, discount=1)
    with pytest.raises(ValueError, match="no transition"):
        kneser_ney.fit([example([A])], vocab_size=4)


def test_a_run_folder_brings_its_tokenizer(tmp_path):
    (tmp_path / "recipe.yaml").write_text("data: {train: x.json, sequence_length: 512}\n")
    recipe = kneser_ney.load(str(tmp_path), ["data.validation_rows=7"])
    assert recipe.data.tokenizer.path == str(tmp_path / "tokenizer")
    assert (recipe.data.sequence_length, recipe.data.validation_rows) == (512, 7)


def test_roleplay_numbers(shared_data):
    """1,500 rows to fit, the last 100 to score, vocabulary 4096: 6.81 and 4.83 nats a token."""
    rows = shared_data / "roleplay" / "roleplay.json"
    recipe = Recipe.model_validate(
        {"data": {"train": str(rows), "sequence_length": 512, "tokenizer": {"vocab_size": 4096}}}
    )
    table = kneser_ney.report(*kneser_ney.build_datasets(recipe)).splitlines()
    name, unigram, bigram = table[2].split()
    assert (name, float(unigram), float(bigram)) == (
        "scored",
        pytest.approx(6.81, abs=5e-3),
        pytest.approx(4.83, abs=5e-3),
    )

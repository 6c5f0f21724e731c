"""How far counting gets: unigram and interpolated Kneser-Ney bigram over the very tokens a run is scored on.

    python benchmarks/baselines/kneser_ney.py runs/roleplay             # a run: its recipe and its tokenizer
    python benchmarks/baselines/kneser_ney.py roleplay data.train=FILE  # a recipe, with overrides

A language model that has learnt to use context beats both by far; one whose loss is near them has not.

Chen and Goodman, "An empirical study of smoothing techniques" (1999), section 3; Jurafsky and Martin,
"Speech and Language Processing" (3rd ed.), section 3.7. With counts c, absolute discount D, vocabulary V,
N(v.) distinct tokens seen after v, N(.w) distinct tokens seen before w, N(..) = sum_w N(.w):

    p(w | v) = max(c(vw) - D, 0) / c(v)   + D N(v.) / c(v)  q(w)                 q(w) where c(v) = 0
    q(w)     = max(N(.w) - D, 0) / N(..)  + D #{w: N(.w) > 0} / N(..)  1 / V     the continuation probability
    unigram  = max(c(w) - D, 0) / c       + D #{w: c(w) > 0} / c  1 / V

Counted are the transitions of the training rows into a scored token, the same ones the model is trained on:
on assistant-only rows this beats counting whole rows (a prompt is written in another style), and the
baseline should be the best of its kind. `scored_only=False` counts every transition of the rendered rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megalign.config.load import load_recipe
from megalign.config.schema import Recipe
from megalign.data.dataset import Dataset, build_datasets
from megalign.data.rows import Example


@dataclass(frozen=True)
class KneserNey:
    """Counts of token pairs and the smoothed unigrams below them. V vocabulary, N distinct pairs."""

    discount: float
    pairs_N: np.ndarray  # int64, sorted: previous * V + token
    counts_N: np.ndarray  # c(vw)
    context_counts_V: np.ndarray  # c(v)
    context_types_V: np.ndarray  # N(v.)
    continuation_V: np.ndarray  # q(w)
    unigram_V: np.ndarray


def fit(
    rows: Iterable[Example], vocab_size: int, discount: float = 0.75, scored_only: bool = True
) -> KneserNey:
    """Count the transitions into scored tokens, or into every token, of `rows`.

    Raises ValueError if there is none, if an id is not below `vocab_size`, or if not 0 < discount < 1.
    """
    if not 0 < discount < 1:
        raise ValueError(f"discount is {discount}, but must lie between 0 and 1; 0.75 is usual")
    previous, token = _transitions(rows, scored_only)
    if not len(token):
        raise ValueError("the rows hold no transition to count; give rows with scored tokens")
    if (largest := max(previous.max(), token.max())) >= vocab_size:
        raise ValueError(
            f"vocab_size is {vocab_size}, but the rows hold id {largest}; raise it to {largest + 1}"
        )
    pairs_N, counts_N = np.unique(previous * vocab_size + token, return_counts=True)
    before_N, after_N = np.divmod(pairs_N, vocab_size)
    return KneserNey(
        discount,
        pairs_N,
        counts_N,
        context_counts_V=np.bincount(before_N, weights=counts_N, minlength=vocab_size),
        context_types_V=np.bincount(before_N, minlength=vocab_size),
        continuation_V=_smoothed(np.bincount(after_N, minlength=vocab_size), discount),
        unigram_V=_smoothed(np.bincount(token, minlength=vocab_size), discount),
    )


def probability(model: KneserNey, previous: np.ndarray, token: np.ndarray) -> np.ndarray:
    """p(token | previous) for two integer arrays of one shape."""
    codes = previous.astype(np.int64) * len(model.unigram_V) + token
    place = np.minimum(np.searchsorted(model.pairs_N, codes), len(model.pairs_N) - 1)
    count = np.where(model.pairs_N[place] == codes, model.counts_N[place], 0)
    seen = model.context_counts_V[previous] > 0
    total = np.where(seen, model.context_counts_V[previous], 1)
    left_over = np.where(seen, model.discount * model.context_types_V[previous] / total, 1)
    return np.maximum(count - model.discount, 0) / total + left_over * model.continuation_V[token]


def nll(model: KneserNey, examples: Iterable[Example]) -> float:
    """Mean negative log-likelihood of the scored tokens given their previous token, in nats."""
    return -float(np.log(probability(model, *_transitions(examples, scored_only=True))).mean())


def unigram_nll(model: KneserNey, examples: Iterable[Example]) -> float:
    """Mean negative log-likelihood of the scored tokens by frequency alone, in nats."""
    return -float(np.log(model.unigram_V[_transitions(examples, scored_only=True)[1]]).mean())


def _transitions(rows: Iterable[Example], scored_only: bool) -> tuple[np.ndarray, np.ndarray]:
    """(previous, token) of every token with a predecessor, in all rows; int64."""
    steps = [(row.input_ids[:-1], row.input_ids[1:], row.loss_mask[1:] | (not scored_only)) for row in rows]
    none = np.zeros(0, dtype=np.int64)
    previous = np.concatenate([none, *(before[counted] for before, _, counted in steps)])
    return previous, np.concatenate([none, *(after[counted] for _, after, counted in steps)])


def _smoothed(counts_V: np.ndarray, discount: float) -> np.ndarray:
    """Absolute discounting, what it takes spread evenly over the vocabulary."""
    spread = discount * np.count_nonzero(counts_V) / len(counts_V)
    return (np.maximum(counts_V - discount, 0) + spread) / counts_V.sum()


def load(run_or_recipe: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a run's folder, with the tokenizer the run used; or that of a file or name."""
    folder = Path(run_or_recipe)
    if not (folder / "recipe.yaml").is_file():
        return load_recipe(run_or_recipe, list(overrides))
    return load_recipe(folder / "recipe.yaml", [f"data.tokenizer.path={folder / 'tokenizer'}", *overrides])


def report(train: Dataset, validation: Dataset, discount: float = 0.75) -> str:
    """A table of nats per scored validation token, counted on scored tokens and on whole rows."""
    fitted, scored = (_examples(dataset) for dataset in (train, validation))
    kept, tokens = validation.statistics["rows_kept"], validation.statistics["scored_tokens"]
    heading = (
        f"vocabulary {train.tokenizer.vocab_size}, discount {discount}, fitted on "
        f"{train.statistics['rows_kept']} rows; nats per scored token on {kept} validation rows ({tokens} tokens):"
    )
    lines = [heading, f"{'counted':<12}{'unigram':>9}{'bigram':>9}"]
    for name, scored_only in (("scored", True), ("whole rows", False)):
        model = fit(fitted, train.tokenizer.vocab_size, discount, scored_only)
        lines.append(f"{name:<12}{unigram_nll(model, scored):>9.4f}{nll(model, scored):>9.4f}")
    return "\n".join(lines)


def _examples(dataset: Dataset) -> list[Example]:
    return [example for pack in dataset.rows for example in pack]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="folder of a run, or a recipe (file or name)")
    parser.add_argument("overrides", nargs="*", help="section.key=value, as for megalign itself")
    parser.add_argument("--discount", type=float, default=0.75)
    args = parser.parse_args()
    print(report(*build_datasets(load(args.run, args.overrides)), args.discount))


if __name__ == "__main__":
    main()

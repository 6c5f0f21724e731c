"""Logistic regression with a ridge, and bags of words: the plain baselines a reward model is held against.

# N rows, F features
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np


def fit_logistic(features_NF: np.ndarray, labels_N: np.ndarray, *, ridge: float = 1.0, steps: int = 30, tolerance: float = 1e-8) -> np.ndarray:
    """[F] weights that minimise sum of log(1 + exp(-y x w)) + ridge/2 |w|^2, y = +-1, by Newton's method.

    No intercept: give a column of ones. For pairs give the difference of the two sides, and labels of 1.
    """
    x, y = np.asarray(features_NF, np.float64), np.where(np.asarray(labels_N) > 0, 1.0, -1.0)
    weights = np.zeros(x.shape[1])
    for _ in range(steps):
        chance = 0.5 * (1 - np.tanh(y * (x @ weights) / 2))  # of being wrong
        gradient = ridge * weights - x.T @ (y * chance)
        curvature = (x * (chance * (1 - chance))[:, None]).T @ x + ridge * np.eye(x.shape[1])
        step = np.linalg.solve(curvature, gradient)
        weights = weights - step
        if np.abs(step).max() < tolerance:
            break
    return weights


class BagOfWords:
    """Counts of the commonest words, log(1 + n) each."""

    def __init__(self, texts: Iterable[str], *, size: int = 1000):
        """size: words kept, those that the most texts have."""
        found = Counter(word for text in texts for word in set(words(text)))
        self.vocabulary = {word: i for i, (word, _) in enumerate(sorted(found.items(), key=lambda item: (-item[1], item[0]))[:size])}

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """[N, F]"""
        counts = np.zeros((len(texts), len(self.vocabulary)))
        for row, text in enumerate(texts):
            for word, number in Counter(words(text)).items():
                if word in self.vocabulary:
                    counts[row, self.vocabulary[word]] = number
        return np.log1p(counts)


def words(text: str) -> list[str]:
    """Lower-case words and marks."""
    return re.findall(r"[a-z']+|[0-9]+|[^\sa-z0-9]", text.lower())

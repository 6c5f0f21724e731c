"""Is it the text, or the user? A predictor of what users do may have learnt who they are (R13).

# N rows, F features
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megalign.rewards.logistic import fit_logistic
from megalign.rewards.measures import auc, bootstrap

SHARE = 0.8  # of what is predicted at all, past which users alone explain it


@dataclass(frozen=True)
class Shortcut:
    """AUC on held-out users, from features of the user alone, and from those with the model's score of the text."""

    user: float
    user_interval: tuple[float, float]
    both: float
    gain: float  # both - user
    gain_interval: tuple[float, float]

    @property
    def share(self) -> float:
        """(user - 0.5) / (both - 0.5), at most 1: how much of what can be predicted the user alone predicts."""
        return min(1.0, max(0.0, self.user - 0.5) / max(1e-9, self.both - 0.5)) if self.both > 0.5 else 0.0

    @property
    def flagged(self) -> bool:
        """Users alone predict better than chance, and the text adds little, or nothing that is sure."""
        return self.user_interval[0] > 0.5 and (self.share > SHARE or self.gain_interval[0] <= 0)


def shortcut(user_NF: np.ndarray, scores_N: np.ndarray, labels_N: np.ndarray, users: Sequence[str], *, folds: int = 5, seed: int = 0) -> Shortcut:
    """Cross-validated over USERS: no user is both trained on and judged.

    user_NF: what is known of the user without the text; scores_N: the model's; labels_N: 0 or 1.
    """
    names = sorted(set(users))
    order = np.random.default_rng(seed).permutation(len(names))
    fold_of = {name: int(order[i]) % folds for i, name in enumerate(names)}
    fold = np.array([fold_of[user] for user in users])
    labels = np.asarray(labels_N)
    alone, both = np.zeros(len(labels)), np.zeros(len(labels))
    for number in range(folds):
        train, test = fold != number, fold == number
        for features, out in ((user_NF, alone), (np.column_stack([user_NF, scores_N]), both)):
            scaled = _standardised(features, train)
            out[test] = scaled[test] @ fit_logistic(scaled[train], labels[train])
    user, with_text = auc(alone, labels), auc(both, labels)
    user_interval = bootstrap(lambda rows: auc(alone[rows], labels[rows]), len(labels), resamples=300, seed=seed)
    gain_interval = bootstrap(lambda rows: auc(both[rows], labels[rows]) - auc(alone[rows], labels[rows]), len(labels), resamples=300, seed=seed)
    return Shortcut(user, user_interval, with_text, with_text - user, gain_interval)


def _standardised(features: np.ndarray, train: np.ndarray) -> np.ndarray:
    mean, std = features[train].mean(0), features[train].std(0)
    return np.column_stack([(features - mean) / np.where(std > 0, std, 1), np.ones(len(features))])

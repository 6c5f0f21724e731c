"""Gain and bias that give rewards mean 0 and standard deviation 1 on reference samples (arXiv:1909.08593, section 2.1)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Normalisation:
    """normalised = (reward - mean) / std; std is over the population (ddof 0)."""

    mean: float
    std: float
    count: int  # reference samples

    @staticmethod
    def of(rewards_N: np.ndarray) -> Normalisation:
        """Of reference samples. Raises ValueError for fewer than two, or equal ones."""
        rewards = np.asarray(rewards_N, np.float64)
        if len(rewards) < 2 or not rewards.std() > 0:
            raise ValueError(f"{len(rewards)} reference rewards with standard deviation {rewards.std() if len(rewards) else 0:g}: nothing to divide by; give more answers")
        return Normalisation(float(rewards.mean()), float(rewards.std()), len(rewards))

    def __call__(self, rewards_N: np.ndarray) -> np.ndarray:
        return (np.asarray(rewards_N, np.float64) - self.mean) / self.std

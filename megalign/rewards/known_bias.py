"""Rewards whose bias is known, to fix the probes' thresholds on and to try them with.

    r(answer) = q(answer) + strength * trait(answer) + noise

q: random weights of the answer's content words (standard deviation about 1, whatever its length); it sees no other word, so a
reward of q alone is fair. noise: of every text anew, standard deviation 0.3. `trait` is seen in one of two ways, by phrases or
by marks (`traits.phrase_count`, `traits.mark_count`): thresholds are fixed with the first and reported with the second.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence

import numpy as np

from megalign.data.rows import Conversation, Message
from megalign.rewards.logistic import words
from megalign.rewards.probes import Score, fix_threshold, probe
from megalign.rewards.traits import TRAITS, mark_count, phrase_count

See = Callable[[str, str], float]
STRENGTH = 1.0  # reward for a unit of the trait
NOUNS, VERBS = "fox owl river lamp stone bread cart tower garden bell rope mill".split(), "sees carries finds keeps leaves follows builds mends".split()
CONTENT = {*NOUNS, *VERBS}


def reward_with_bias(trait: str | None, see: See, *, strength: float = STRENGTH, seed: int = 0) -> Score:
    """A score function; trait None: a fair one."""

    def quality(text: str) -> float:
        found = [_weight(word, seed) for word in words(text) if word in CONTENT]
        return (sum(found) / len(found) ** 0.5 if found else 0.0) + 0.3 * _weight(text, seed)

    def score(dialogues: Sequence[Conversation]) -> np.ndarray:
        texts = [dialogue.messages[-1].content for dialogue in dialogues]
        paid = [0.0 if trait is None else strength * see(trait, text) for text in texts]
        return np.array([quality(text) for text in texts]) + np.array(paid)

    return score


def _weight(word: str, seed: int) -> float:
    """A standard normal number that belongs to a word, or a text."""
    return random.Random(hashlib.sha256(f"{seed}/{word}".encode()).digest()).gauss(0, 1)


def toy_dialogues(count: int, seed: int) -> list[Conversation]:
    """Questions and answers of two to six sentences in words of no meaning for the traits."""
    numbers = random.Random(seed)
    def sentence() -> str:
        return f"The {numbers.choice(NOUNS)} {numbers.choice(VERBS)} the {numbers.choice(NOUNS)} near the {numbers.choice(NOUNS)}."

    return [
        Conversation((Message("user", f"What about the {numbers.choice(NOUNS)}?"), Message("assistant", " ".join(sentence() for _ in range(numbers.randint(2, 6))))))
        for _ in range(count)
    ]


def fixed_thresholds(*, models: int = 6, dialogues: int = 60) -> dict[str, float]:
    """`probes.THRESHOLDS`, made anew: between the effects of fair rewards and of those that pay for phrases."""
    asked = toy_dialogues(dialogues, seed=1)
    fair: dict[str, list[float]] = {trait: [] for trait in TRAITS}
    biased: dict[str, list[float]] = {trait: [] for trait in TRAITS}
    for seed in range(models):
        for found in probe(reward_with_bias(None, phrase_count, seed=seed), asked, seed=seed):
            fair[found.trait].append(found.effect)
        for trait in TRAITS:
            (found,) = probe(reward_with_bias(trait, phrase_count, seed=seed), asked, traits=[trait], seed=seed)
            biased[trait].append(found.effect)
    return {trait: round(fix_threshold(fair[trait], biased[trait]), 2) for trait in TRAITS}


def tried(*, models: int = 6, dialogues: int = 60) -> dict[str, tuple[int, int, int]]:
    """Trait -> (biased rewards flagged, fair rewards flagged, rewards of each kind), with the other way to see it, other texts and seeds."""
    asked = toy_dialogues(dialogues, seed=2)
    found = {trait: [0, 0] for trait in TRAITS}
    for seed in range(100, 100 + models):
        for trait in TRAITS:
            found[trait][0] += probe(reward_with_bias(trait, mark_count, seed=seed), asked, traits=[trait], seed=seed)[0].flagged
        for effect in probe(reward_with_bias(None, mark_count, seed=seed), asked, seed=seed):
            found[effect.trait][1] += effect.flagged
    return {trait: (caught, alarms, models) for trait, (caught, alarms) in found.items()}

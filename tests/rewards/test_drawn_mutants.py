"""Best-of-n, rejection sampling and distillation broken on purpose: each fault turns the named test red.

Judges of answers have theirs in `tests/end_to_end/judge_checks.py`, divergences over a cut vocabulary in
`tests/parallel/divergence_checks.py`.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("kernels", "losses", "rewards")]
from mutants import mutant  # noqa: E402

# What is broken; module, piece of its source, what takes its place; the test that must see it.
FAULTS = [
    ("the worst for the best", "rewards.selection", "np.argmax(rewards)", "np.argmin(rewards)", "selection.test_the_best_is_the_first_of_the_largest"),
    ("of equals the last", "rewards.selection", "int(np.argmax(rewards))", "len(rewards) - 1 - int(np.argmax(rewards[::-1]))", "selection.test_the_best_is_the_first_of_the_largest"),
    ("times beta for over beta", "rewards.selection", "(rewards - limit) / beta", "(rewards - limit) * beta", "selection.test_accepted_answers_are_boltzmann"),
    ("the mean is the bound", "rewards.selection", "float(np.max(rewards)) if bound", "float(np.mean(rewards)) if bound", "selection.test_pairs_come_from_accepted_answers_that_were_finished"),
    ("accepted whatever the reward", "rewards.selection", "uniform < np.exp((rewards - limit) / beta)", "uniform < 0.5", "selection.test_accepted_answers_are_boltzmann"),
    ("rewards above the bound are let pass", "rewards.selection", "if np.max(rewards) > limit", "if False", "selection.test_rejection_sampling_refuses_what_is_no_probability"),
    ("chosen and rejected swapped", "rewards.selection", "if rewards[i] > rewards[i + 1]", "if rewards[i] < rewards[i + 1]", "selection.test_neighbours_make_pairs_and_ties_none"),
    ("an answer in two pairs", "rewards.selection", "len(rewards) - 1, 2)", "len(rewards) - 1, 1)", "selection.test_neighbours_make_pairs_and_ties_none"),
    ("ties are pairs", "rewards.selection", " if rewards[i] != rewards[i + 1]]", "]", "selection.test_neighbours_make_pairs_and_ties_none"),
    ("KL without its second term", "rewards.overoptimisation", "math.log(n) - (n - 1) / n", "math.log(n)", "overoptimisation.test_kl_of_best_of_n"),
    ("a cut answer is imitated", "best_of_n", "if answer.finished]", "]", "selection.test_the_best_finished_answer_is_imitated_unless_it_is_bad"),
    ("the place among finished answers is taken for the place", "best_of_n", "winner = finished[best(", "winner = [*range(99)][best(", "selection.test_the_best_finished_answer_is_imitated_unless_it_is_bad"),
    ("the text of another answer", "best_of_n", "entry.answers[winner].text", "entry.answers[0].text", "selection.test_the_best_finished_answer_is_imitated_unless_it_is_bad"),
    ("the reference is left in the prompt", "best_of_n", "as_messages(entry.row.messages[:-1]), answer", "as_messages(entry.row.messages), answer", "selection.test_the_best_finished_answer_is_imitated_unless_it_is_bad"),
    ("bad answers are imitated", "best_of_n", ">= min_score", ">= min_score - 9", "selection.test_the_best_finished_answer_is_imitated_unless_it_is_bad"),
    ("a cut answer is in a pair", "rso", "if answer.finished]", "]", "selection.test_pairs_come_from_accepted_answers_that_were_finished"),
    ("the score of another candidate", "rso", "used = [finished[i] for i in", "used = [i for i in", "selection.test_pairs_come_from_accepted_answers_that_were_finished"),
    ("answers that were not accepted", "rso", "accepted[: settings.accepted]", "range(settings.accepted)", "selection.test_pairs_come_from_accepted_answers_that_were_finished"),
    ("more answers than asked for", "rso", "accepted[: settings.accepted]", "accepted", "selection.test_pairs_come_from_accepted_answers_that_were_finished"),
    ("reverse for forward", "losses.distill", "return _kl(teacher_logprobs_NV, logprobs_NV)", "return _kl(logprobs_NV, teacher_logprobs_NV)", "distill_losses.test_divergences"),
    ("the teacher at temperature 1", "losses.distill", "_log_softmax(teacher_logits, temperature)", "_log_softmax(teacher_logits, 1.0)", "distill_losses.test_divergences"),
    ("beta the student's share", "losses.distill", "[1 - beta, beta]", "[beta, 1 - beta]", "distill_losses.test_divergences"),
    ("the teacher learns", "losses.distill", "_log_softmax(teacher_logits, temperature).detach()", "_log_softmax(teacher_logits, temperature)", "distill_losses.test_gradients_reach_the_student_alone"),
    ("mean for sum", "losses.distill", "TokenLoss(losses_N.sum()", "TokenLoss(losses_N.mean()", "distill_losses.test_divergences"),
    ("no bin for the rest", "losses.distill", " + teacher_rest.exp() * (teacher_rest - rest)", "", "distill_losses.test_top_k_bounds_the_divergence_from_below_and_reaches_it"),
    ("log of 1 - 1", "losses.preference", "x = x.clamp(max=-1e-6)", "x = x.clamp(max=0.0)", "distill_losses.test_a_teacher_that_is_sure_leaves_finite_losses"),
    ("infinite logits of padding", "losses.distill", ".clamp(min=-1e30)", "", "distill_losses.test_padding_rows_of_the_vocabulary_count_nothing"),
    ("imitation turned round", "losses.distill", "(teacher_logprobs_N.detach() - logprobs_N)", "(logprobs_N - teacher_logprobs_N.detach())", "distill_losses.test_sequence_distillation_has_the_gradient_of_cross_entropy"),
]  # fmt: skip

USERS = ("megalign.best_of_n", "megalign.rso", "megalign.losses.distill")  # modules that import what is broken


@pytest.mark.parametrize("what, module, old, new, test", FAULTS, ids=[fault[0] for fault in FAULTS])
def test_a_fault_is_seen(what: str, module: str, old: str, new: str, test: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sound = importlib.import_module(f"megalign.{module}")
    broken = mutant(sound, tmp_path, old, new)
    tests = importlib.import_module(f"test_{test.partition('.')[0]}")
    for place in (tests, *map(importlib.import_module, USERS)):
        for name, value in vars(place).copy().items():
            if place is not sound and defined_in(value, sound):
                monkeypatch.setattr(place, name, getattr(broken, name))
    with pytest.raises((AssertionError, ValueError, pytest.fail.Exception)):
        for arguments in cases(getattr(tests, test.partition(".")[2])):
            getattr(tests, test.partition(".")[2])(**{name: getattr(broken, value.__name__) if defined_in(value, sound) else value for name, value in arguments.items()})


@pytest.mark.parametrize("test", sorted({fault[-1] for fault in FAULTS} - {"selection.test_accepted_answers_are_boltzmann"}))
def test_what_is_sound_passes(test: str):
    """Called as above: what is seen there is the fault, and not the way of calling. (The one left out is long, and runs by itself.)"""
    function = getattr(importlib.import_module(f"test_{test.partition('.')[0]}"), test.partition(".")[2])
    for arguments in cases(function):
        function(**arguments)


def defined_in(value: Any, module: ModuleType) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module.__name__


def cases(test: Callable[..., None]) -> Iterator[dict[str, Any]]:
    """Arguments of each of a test's parametrised cases."""
    marks = [mark.args for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
    for values in itertools.product(*(rows for _, rows in marks)):
        found: dict[str, Any] = {}
        for (names, _), value in zip(marks, values, strict=True):
            parts = names.replace(" ", "").split(",")
            found |= dict(zip(parts, value if len(parts) > 1 else (value,), strict=True))
        yield found

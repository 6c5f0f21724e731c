"""Faults planted in the code of reward models, each of which must turn the test red that is named beside it.

A fault is a piece of source in the place of another. Functions keep their identity and get the broken one's code, so that every module
that imported them is broken too. Faults of the forward pass on several ranks: tests/parallel/test_rm_layouts.py.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
LOSSES, HEADS, MEASURES = "megalign.losses.reward", "megalign.rewards.heads", "megalign.rewards.measures"
ENSEMBLE, SHIFT, SHORTCUT = "megalign.rewards.ensemble", "megalign.rewards.shift", "megalign.rewards.shortcut"
# name: module, sound, broken, test file::function, its arguments
FAULTS: dict[str, tuple[str, str, str, str, tuple[Any, ...]]] = {
    "last position of the segment, padding or not": ("megalign.batch", "last[torch.searchsorted(real, real[ends]) - 1]", "last[ends - 1]", "models/test_heads.py::test_the_last_real_token_of_each_document", ()),
    "one token before the last": ("megalign.batch", "real[ends]) - 1] = True", "real[ends]) - 2] = True", "models/test_heads.py::test_the_last_real_token_of_each_document", ()),
    "head starts at 1 / D": ("megalign.models.heads", "1 / math.sqrt(shape[-1] + 1)", "1 / (shape[-1] + 1)", "models/test_heads.py::test_a_head_begins_with_rewards_of_order_one", ()),
    "rejected above chosen": (LOSSES, "difference = chosen_P - rejected_P", "difference = rejected_P - chosen_P", "losses/test_reward_losses.py::test_bradley_terry_golden_numbers", (1.5, 0.2014)),
    "margin added": (LOSSES, "difference - margin_P", "difference + margin_P", "losses/test_reward_losses.py::test_bradley_terry_options", ()),
    "smoothing without flipping": (LOSSES, "label_smoothing * logsigmoid(-logits)", "label_smoothing * logsigmoid(logits)", "losses/test_reward_losses.py::test_bradley_terry_options", ()),
    "difference centred, not the sum": (LOSSES, "centering * (chosen_P + rejected_P)", "centering * (chosen_P - rejected_P)", "losses/test_reward_losses.py::test_bradley_terry_options", ()),
    "weights left out of the count": (LOSSES, "return PairLoss((w * losses).sum(), w.sum()", "return PairLoss((w * losses).sum(), torch.ones_like(w).sum()", "losses/test_reward_losses.py::test_bradley_terry_options", ()),
    "censored times taken for events": (LOSSES, "torch.where(observed_N, log_scale_N, 0.0)", "log_scale_N", "losses/test_reward_losses.py::test_censoring_leaves_no_bias", ()),
    "censoring the wrong way round (Weibull)": (LOSSES, "torch.where(observed_N, hazard, 0.0)", "torch.where(observed_N, 0.0, hazard)", "rewards/test_head_losses.py::test_censored_times_are_not_biased", ("weibull",)),
    "second answer never the better one": (HEADS, "as_judged = label > 0", "as_judged = label > -2", "rewards/test_head_losses.py::test_pairs_by_this_heads_measure", ()),
    "head counts what it does not know": (HEADS, "return facts[\"weight\"][known].sum()", "return facts[\"weight\"].sum()", "rewards/test_head_losses.py::test_heads_are_isolated", ()),
    "thresholds of all documents added": (HEADS, "values[:, 1:].sum(0) / max(1, len(values))", "values[:, 1:].sum(0)", "rewards/test_head_losses.py::test_ordinal_thresholds_get_the_whole_gradient", ()),
    "log1p never undone": (HEADS, "np.expm1(first) if", "first if", "rewards/test_head_losses.py::test_what_numbers_mean", ()),
    "normal interval for Wilson's": (MEASURES, "z / (1 + z * z / trials) * math.sqrt", "z * math.sqrt", "rewards/test_measures.py::test_wilson_is_the_published_interval", ()),
    "ties count whole": (MEASURES, "(ends - (counts - 1) / 2)", "ends", "rewards/test_measures.py::test_auc_counts_pairs_and_ties_half", ()),
    "every bin weighs the same": (MEASURES, "abs(mean - share) * count for", "abs(mean - share) for", "rewards/test_measures.py::test_calibration_error", ()),
    "calibration asked one way only": (MEASURES, "% 2 == 0\n", "% 2 >= 0\n", "rewards/test_shift.py::test_both_ways_of_asking", ()),
    "order known though censored": (MEASURES, "& observed.astype(bool)[:, None]", "", "rewards/test_measures.py::test_times_with_censoring", ()),
    "base rate of one class, twice": (MEASURES, '"base_rate": float(np.bincount(labels.astype(int)).max()', '"base_rate": float(np.bincount(labels.astype(int))[0] * 2', "rewards/test_measures.py::test_other_kinds", ()),
    "normalised by the variance": ("megalign.rewards.normalise", "- self.mean) / self.std", "- self.mean) / self.std**2", "rewards/test_measures.py::test_normalisation", ()),
    "normalisation without the mean": ("megalign.rewards.normalise", "np.float64) - self.mean)", "np.float64))", "rewards/test_measures.py::test_normalisation", ()),
    "sample deviation for the population's": (ENSEMBLE, "rewards.std(0, ddof=ddof)", "rewards.std(0, ddof=1 - ddof)", "rewards/test_ensemble.py::test_pessimistic_mean", ()),
    "optimistic": (ENSEMBLE, ".mean(0) - alpha", ".mean(0) + alpha", "rewards/test_ensemble.py::test_pessimistic_mean", ()),
    "gate opens where models disagree": (ENSEMBLE, "/ limit) ** sharpness", "/ limit) ** -sharpness", "rewards/test_ensemble.py::test_out_of_distribution_answers_move_nothing", ()),
    "gate limit from the wrong tail": (ENSEMBLE, "ddof=ddof), quantile)", "ddof=ddof), 1 - quantile)", "rewards/test_ensemble.py::test_out_of_distribution_answers_move_nothing", ()),
    "shortcut never flagged": (SHORTCUT, "return self.user_interval[0] > 0.5 and", "return self.user_interval[0] > 1.0 and", "rewards/test_probes.py::test_a_planted_user_trait_is_exposed", ()),
    "text compared with itself": (SHORTCUT, "(user_NF, alone), (", "(np.column_stack([user_NF, scores_N]), alone), (", "rewards/test_probes.py::test_a_planted_user_trait_is_exposed", ()),
    "probe the wrong way round": ("megalign.rewards.probes", "difference = with_trait - control", "difference = control - with_trait", "rewards/test_probes.py::test_a_punished_trait_is_flagged_too_and_others_are_not", ()),
    "length measured on unbalanced pairs": ("megalign.rewards.probes", "[:count], numbers.permutation(lost)[:count]", ", numbers.permutation(lost)", "rewards/test_probes.py::test_length_preference_is_of_the_reward_and_not_of_the_pairs", (0.945,)),
    "best of n + 1": ("megalign.rewards.overoptimisation", "math.comb(k, n - 1) / math.comb(candidates, n)", "math.comb(k, n) / math.comb(candidates, n + 1)", "rewards/test_overoptimisation.py::test_best_of_n_is_the_mean_over_all_subsets", ()),
    "curve over KL, not its root": ("megalign.rewards.overoptimisation", "np.sqrt(np.asarray(kl, np.float64))", "np.asarray(kl, np.float64)", "rewards/test_overoptimisation.py::test_the_curve_is_recovered", ()),
    "shift as if the reference were exact and large": (SHIFT, " + 1 / reference.count", "", "rewards/test_shift.py::test_the_shift_is_known_as_well_as_its_samples_allow", ()),
    "every calibration error alarms": (SHIFT, "self.error > self.limit and self.error - self.expected", "self.error", "rewards/test_shift.py::test_chances_that_no_longer_hold_raise_the_alarm", ()),
    "rows held out, not users": ("megalign.data.user_split", "if user in held and when >= cut:", "if when >= cut:", "data/test_user_split.py::test_no_user_and_no_day_is_on_both_sides", ()),
    "labels from behind the cut": ("megalign.data.user_split", "elif when + horizon > cut:", "elif when > cut:", "data/test_user_split.py::test_no_user_and_no_day_is_on_both_sides", ()),
    "not yet back is never back": ("megalign.data.judgements", "1.0 if observed else math.nan", "1.0 if observed else 0.0", "data/test_user_split.py::test_a_time_becomes_yes_no_or_unknown", ()),
}  # fmt: skip


def functions_of(holder: Any, module: str) -> dict[str, FunctionType]:
    """Functions, methods and properties that a module's source defines, by qualified name."""
    found: dict[str, FunctionType] = {}
    for value in list(vars(holder).values()):
        if isinstance(value, property):
            value = value.fget
        if isinstance(value, staticmethod):
            value = value.__func__
        if inspect.isclass(value) and value.__module__ == module:
            found |= functions_of(value, module)
        elif isinstance(value, FunctionType) and value.__module__ == module:
            found[value.__qualname__] = value
    return found


@contextlib.contextmanager
def planted(name: str, sound: str, broken: str) -> Iterator[None]:
    """The module with `broken` in the place of `sound`."""
    module = importlib.import_module(name)
    source = inspect.getsource(module)
    assert source.count(sound) == 1, f"{name} has {sound!r} {source.count(sound)} times"
    specification = importlib.util.find_spec(name)
    assert specification is not None
    other = importlib.util.module_from_spec(specification)
    exec(compile(source.replace(sound, broken), str(module.__file__), "exec"), vars(other))
    whole, spoilt = functions_of(module, name), functions_of(other, name)
    kept = {key: function.__code__ for key, function in whole.items()}
    try:
        for key, function in whole.items():
            if function.__code__ != spoilt[key].__code__:
                function.__code__ = spoilt[key].__code__
        yield
    finally:
        for key, function in whole.items():
            function.__code__ = kept[key]


def the_test(place: str) -> Any:
    file, _, function = place.partition("::")
    specification = importlib.util.spec_from_file_location(f"mutated_{Path(file).stem}", TESTS / file)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return getattr(module, function)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_turns_its_test_red(fault: str, monkeypatch: pytest.MonkeyPatch):
    module, sound, broken, place, arguments = FAULTS[fault]
    monkeypatch.syspath_prepend(str((TESTS / place).parent))  # what stands beside the test
    test = the_test(place)
    test(*arguments)
    with planted(module, sound, broken), pytest.raises((AssertionError, ValueError, ArithmeticError, pytest.fail.Exception)):
        test(*arguments)

"""NVIDIA/Megatron-LM 7452, errors of composed parallelism, its findings one by one: shown here, or out of reach and why.

 3 prediction modules' tokens counted by each rank, 9 context ranks divide by their own tokens, 11 a norm of the heads under
an unknown name: test_upstream_bugs.py. 4 to 7, 13 (a group of our own beside megatron's global one): there is none.
12 (checkpoints of Megatron FSDP): not used.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from typing import Any

import composition_checks
import pytest
import torch
from composition_checks import SMOOTHING, TOKENS, VOCAB
from ranks import run_ranks

ROOT = Path(__file__).parents[2]


@functools.cache
def ranks() -> list[Any]:
    return run_ranks(composition_checks.all_of_them, 2)


def true_losses() -> torch.Tensor:
    logits, targets = composition_checks.logits_and_targets()
    return torch.nn.functional.cross_entropy(logits[:, 0].double(), targets[:, 0], reduction="none")


def calls_with(argument: str) -> list[str]:
    """Files of ours in which a call has this keyword."""
    files = [path for folder in ("megalign", "parallel") for path in (ROOT / folder).rglob("*.py") if not any(p.is_symlink() for p in path.parents)]
    return [
        str(path.relative_to(ROOT))
        for path in files
        if any(isinstance(node, ast.Call) and any(keyword.arg == argument for keyword in node.keywords) for node in ast.walk(ast.parse(path.read_text())))
    ]


def test_finding_1_label_smoothing_depends_on_the_rank():
    """(1 - s) nll - s mean log p, s = alpha V / (V - 1), with V and the mean of this rank's part (cross_entropy.py:152). We call it nowhere."""
    logits, targets = composition_checks.logits_and_targets()
    logprobs = logits[:, 0].double().log_softmax(-1)
    share = SMOOTHING * VOCAB / (VOCAB - 1)
    right = (1 - share) * true_losses() - share * logprobs.mean(-1)
    wrong = [rank[0]["label smoothing"].double() for rank in ranks()]
    assert (wrong[0] - wrong[1]).abs().max() > 0.05 and (wrong[0] - right).abs().max() > 0.01
    assert not uses("cross_entropy")


def uses(module: str) -> list[str]:
    """Files of ours that import a module of megatron's tensor parallelism."""
    found = []
    for folder in ("megalign", "parallel"):
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text())
            named = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
            found += [str(path) for name in named if name == f"megatron.core.tensor_parallel.{module}"]
    return found


def test_finding_2_gathered_logits_cost_log_tp():
    """Whole logits on each of two ranks are taken for parts: log 2 too much. Ours score the parts."""
    for rank in ranks():
        torch.testing.assert_close(rank[0]["gathered logits"].double(), true_losses() + torch.log(torch.tensor(2.0)).double(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(-rank[0]["ours"].double(), true_losses(), rtol=1e-5, atol=1e-5)


def test_finding_8_a_cut_parameter_without_its_flag_is_left_out_of_the_norm():
    """Norm^2 of two ranks lacks what the second one has (optimizer.py:147); declared, it is that of one process."""
    alone = run_ranks(composition_checks.sinks, 1, {}, False)[0][0]
    (_, wrong, right), (_, _, second) = ranks()
    assert right[0] == pytest.approx(alone, rel=1e-6)
    assert wrong[0] == pytest.approx((alone**2 - second[1] ** 2) ** 0.5, rel=1e-6) and wrong[0] < alone * (1 - 1e-5)


def test_finding_10_a_masked_count_is_overwritten():
    """The count of this rank's tokens is summed over the group in place (moe_utils.py:224): 5 of 2 and 3. It scales auxiliary losses
    under calculate_per_token_loss alone, which we never set."""
    assert [rank[0]["masked tokens"] for rank in ranks()] == [[5.0, 5.0], [5.0, 5.0]]
    assert TOKENS > 5 and calls_with("calculate_per_token_loss") == []


def test_findings_4_to_7_and_13_need_groups_beside_the_global_ones():
    for rank in ranks():
        assert rank[0]["groups of our own"] == []
    assert calls_with("distribute_saved_activations") == []


def test_finding_12_megatron_fsdp_is_not_used():
    assert calls_with("use_megatron_fsdp") == [] and calls_with("use_custom_fsdp") == []

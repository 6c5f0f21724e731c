"""Grouped experts equal sequential ones: outputs, gradients, layouts, checkpoints; and when they are chosen."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import grouped_checks
import pytest
import torch
from ranks import run_ranks

sys.path.append(str(Path(__file__).parents[1] / "parallel"))
import layout_checks
from test_layouts import MOE, TP2, worst_gradient

UNEVEN, SOME_EMPTY, ALL_ON_FIRST = [0.0] * 4, [6.0, 0.0, -9.0, 5.0, -9.0, 0.0, -9.0, 0.0], [50.0, 40.0, -9.0, -9.0]


def compare(sequential: dict[str, Any], grouped: dict[str, Any]) -> None:
    assert (sequential["kind"], grouped["kind"]) == ("SequentialMLP", "GroupedExperts")
    assert sequential["rows"] == grouped["rows"]
    torch.testing.assert_close(grouped["out"], sequential["out"], rtol=0, atol=1e-6)
    torch.testing.assert_close(grouped["x"], sequential["x"], rtol=0, atol=1e-5)
    assert grouped["grads"].keys() == sequential["grads"].keys()
    for name, grad in sequential["grads"].items():
        grad = torch.zeros_like(grouped["grads"][name]) if grad is None else grad
        torch.testing.assert_close(grouped["grads"][name], grad, rtol=0, atol=float(1e-5 * grad.abs().max()) + 1e-9, msg=name)


@pytest.mark.parametrize("bias, topk, changes", [
    (UNEVEN, 2, {}), (SOME_EMPTY, 2, {}), (SOME_EMPTY, 1, {"moe_norm_topk_prob": False}),
    (UNEVEN, 2, {"gated_linear_unit": False, "activation_func": "gelu"}),
])  # fmt: skip
def test_one_rank(bias: list[float], topk: int, changes: dict[str, Any]) -> None:
    sequential, grouped = run_ranks(grouped_checks.both, 1, 13, bias, topk, changes)[0]
    rows = sequential["rows"]
    assert sum(rows) == 13 * topk and len(set(rows)) > 1 and (bias is UNEVEN or 0 in rows)
    compare(sequential, grouped)


def test_a_rank_without_a_token() -> None:
    """Expert parallelism over two ranks, all tokens on the first rank's experts: the second has gradients of zero."""
    first, second = run_ranks(grouped_checks.both, 2, 6, ALL_ON_FIRST, 2, {})
    assert sum(first[0]["rows"]) == 24 and sum(second[0]["rows"]) == 0
    compare(*first)
    compare(*second)
    experts = [grad for name, grad in second[1]["grads"].items() if "local_experts" in name]
    assert experts and not any(grad.any() for grad in experts)


@pytest.mark.parametrize(
    "world, layout",
    [(2, {"expert_model_parallel_size": 2}), (4, {**TP2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2})],
)
def test_layouts_equal_one_process_of_sequential_experts(world: int, layout: dict[str, Any]) -> None:
    expected = run_ranks(layout_checks.gradients, 1, {**MOE, "moe_grouped_gemm": False}, {}, {})[0]
    found = run_ranks(layout_checks.gradients, world, {**MOE, "moe_grouped_gemm": True}, layout, {})[0]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert found["norm"] == pytest.approx(expected["norm"], rel=1e-6)
    ratio, name = worst_gradient(found, expected)
    assert ratio <= 1, f"{name}: {ratio:.1f} times the tolerance"


def test_checkpoints_do_not_know_the_difference(tmp_path: Path) -> None:
    """Model and Adam states saved by grouped experts on two ranks go on in sequential ones on one, and back."""
    grouped, sequential = ({**MOE, "moe_grouped_gemm": kind} for kind in (True, False))
    ep2 = {"expert_model_parallel_size": 2}
    saved = run_ranks(layout_checks.weights_of_checkpoint, 2, grouped, ep2, {}, tmp_path, None)[0]
    for world, model, layout in ((1, sequential, {}), (2, grouped, ep2)):
        loaded = run_ranks(layout_checks.weights_of_checkpoint, world, model, layout, {}, tmp_path, saved["path"])[0]
        assert loaded["weights"].keys() == saved["weights"].keys()
        assert all(torch.equal(loaded["weights"][name], weight) for name, weight in saved["weights"].items())
        assert loaded["loss"] == pytest.approx(saved["loss"], rel=1e-5)


def test_the_choice() -> None:
    from megalign.parallel import experts

    assert not experts.use_grouped(False, "cuda", torch.bfloat16, 64, 64)
    assert not experts.use_grouped(None, "cpu", torch.float32, 64, 64)  # a loop there: no gain
    assert experts.use_grouped(True, "cpu", torch.float32, 64, 64)
    with pytest.raises(RuntimeError, match=r"no grouped matmul for torch.bfloat16 on cpu with rows of 17 and 3; .*multiples of 16 bytes"):
        experts.use_grouped(True, "cpu", torch.bfloat16, 17, 3)


def test_auto_takes_the_kernel_where_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    from megalign.parallel import experts

    for works in (True, False):
        monkeypatch.setattr(experts, "_works", lambda *_, answer=works: answer)
        assert experts.use_grouped(None, "cuda", torch.bfloat16, 64, 64) is works

"""A pipeline stage without experts, and data-parallel ranks without a share: checkpoints hold the true step all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import empty_part_checks
import pytest
import torch
from ranks import run_ranks

STAGES = {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}
NORM_ALONE = {"freeze": ["embedding", "decoder.layers", "output_layer"]}  # 32 numbers for four data-parallel ranks
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sharded": (STAGES, {}),
    "sharded-bf16": (STAGES, {"precision": "bf16"}),
    "unsharded": ({**STAGES, "use_distributed_optimizer": False}, {}),
    "unsharded-bf16": ({**STAGES, "use_distributed_optimizer": False}, {"precision": "bf16"}),
    "few": ({}, NORM_ALONE),
}


def test_a_stage_without_experts_saves_and_resumes(tmp_path: Path):
    results = run_ranks(empty_part_checks.run, 4, CASES, tmp_path)
    for case, (parallel, train) in CASES.items():
        first, last = results[0][case], results[-1][case]
        assert (first["empty"], last["empty"]) == (([False], [True]) if case == "few" else ([False, True], [False, False])), case
        assert first["again"] == first["losses"][2:], case
        assert all(torch.equal(first["resumed"][name], weight) for name, weight in first["weights"].items()), case
        losses, weights = run_ranks(empty_part_checks.elsewhere, 1, first["path"], parallel.get("use_distributed_optimizer", True), train)[0]
        bf16 = train.get("precision") == "bf16"
        assert losses == pytest.approx(first["losses"][2:], rel=2e-2 if bf16 else 1e-5), case
        if not bf16:  # Adam's step is in its bias correction: with a step of 0 a weight would move by up to 2.2 times as much
            for name, weight in first["weights"].items():
                torch.testing.assert_close(weights[name], weight, rtol=0, atol=2e-5, msg=f"{case} {name}")

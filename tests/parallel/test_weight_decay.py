"""Matrices decay, norms and biases do not: in every kind of optimizer, and after a checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import weight_decay_checks
from ranks import run_ranks

sys.path.append(str(Path(__file__).parents[1] / "trainer"))  # shadow_checks

BIASES: dict[str, Any] = {"model": {"add_qkv_bias": True, "qk_layernorm": True}, "ema_decay": None, "eval_ema": False}
CASES: dict[int, list[dict[str, Any]]] = {
    1: [{"parallel": {"use_distributed_optimizer": False}, **BIASES}, {"parallel": {}, "precision": "bf16", "optimizer_cpu_offload": True, **BIASES}],
    2: [{"parallel": {}, **BIASES}, {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}, "precision": "bf16", **BIASES}],
}


@pytest.mark.parametrize("world", CASES)
def test_what_decays(world: int, tmp_path: Path):
    """w <- w (1 - lr * weight_decay) of every matrix; vectors stay bit for bit, where there is no gradient."""
    for case, (before, after, factor) in zip(CASES[world], run_ranks(weight_decay_checks.decayed, world, CASES[world], tmp_path)[0], strict=True):
        rounding = 2**-7 if case.get("precision") == "bf16" else 1e-6
        vectors = {name for name, full in before.items() if full.dim() == 1}
        assert any(name.endswith("bias") for name in vectors) and any("q_layernorm" in name for name in vectors) and any("final_layernorm" in name for name in vectors)
        assert factor == pytest.approx(0.95) and len(vectors) < len(before)
        for name, full in before.items():
            if name in vectors:
                assert torch.equal(after[name], full), name
            else:
                torch.testing.assert_close(after[name].float(), full.float() * factor, rtol=rounding, atol=0, msg=name)
                assert not torch.equal(after[name], full), name

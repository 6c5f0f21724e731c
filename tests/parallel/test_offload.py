"""Masters and moments on the host: the same numbers bit for bit, their memory, and checkpoints of both kinds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import offload_checks
import pytest
import torch
from ranks import run_ranks

sys.path.append(str(Path(__file__).parents[1] / "trainer"))  # shadow_checks

MODEL_4 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2, "sequence_parallel": True}
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one-fp32": (1, {}, {}),
    "one-bf16": (1, {}, {"precision": "bf16"}),
    "dp2-bf16": (2, {}, {"precision": "bf16"}),
    "tp2-pp2-ep2-bf16": (4, MODEL_4, {"precision": "bf16"}),
}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("case", CASES)
def test_every_number_is_that_of_the_device(case: str, tmp_path: Path):
    """Weights, losses and averages after four clipped steps; resumed; and each kind's checkpoint continued by the other."""
    world, parallel, train = CASES[case]
    device = run_ranks(offload_checks.run, world, parallel, tmp_path / "device", train, False)
    host = run_ranks(offload_checks.run, world, parallel, tmp_path / "host", train, True)
    assert device[0]["kinds"] == {"AdamW"} and host[0]["kinds"] == {"HostAdamW"}
    assert device[0]["losses"] == host[0]["losses"] and len(set(host[0]["losses"])) == 4
    for key in ("weights", "average", "resumed"):
        assert same(device[0][key], host[0][key]), key
    assert same(host[0]["resumed"], host[0]["weights"])
    for saved, offloaded in ((device[0]["path"], True), (host[0]["path"], False)):
        assert same(run_ranks(offload_checks.go_on, world, parallel, saved, train, offloaded)[0], host[0]["weights"])
    for rank in host:
        on_device, on_host = rank["bytes"]
        assert on_device == 0 and rank["moments"] == {"cpu"} and not rank["leftover"]
        assert on_host == 12 * rank["owned"]  # master and two moments, FP32


def test_the_plan_counts_it_on_the_host():
    from megalign.config.memory import memory_per_rank
    from megalign.config.schema import Recipe

    def planned(offloaded: bool) -> dict[str, int]:
        given = {"train": {"precision": "bf16", "ema_decay": 0.99}, "optimizer": {"optimizer_cpu_offload": offloaded}}
        return memory_per_rank(Recipe.model_validate(given), 512, 1)[0]

    device, host = planned(False), planned(True)
    moved = device["masters"] + device["moments"] + device["average"]
    assert host["masters"] == host["moments"] == host["average"] == 0
    assert host["host"] == moved == 16 * device["parameters"]
    assert device["total"] - host["total"] == moved

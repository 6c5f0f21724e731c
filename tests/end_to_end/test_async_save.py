"""Checkpoints written beside training: the bytes of those that training waited for, later and one at a time."""

from __future__ import annotations

import json
from pathlib import Path

import fault_checks
import sft_checks
from ranks import run_ranks
from sft_checks import MOE_4, curve, metrics, recipe

from megalign.parallel.checkpoint import list_checkpoints, verify


def hashes(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of the tensors and generators; not of the index, which holds no state, nor of meta.json, which holds paths."""
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith((".distcp", "common.pt")) or name.startswith("rng/")}


def test_a_save_in_the_background_is_the_save_that_waits(tmp_path: Path):
    """Bitwise, though each shard reaches the slow disk steps after it was taken; pruned alike; resumed bitwise."""
    layout = {**MOE_4, "use_distributed_optimizer": False}  # whose Adam state megatron hands out uncopied
    train = {"save_interval": 2, "eval_interval": 2, "keep_last": 2, "keep_best": 1, "stop_at_step": 7}
    sync = recipe(tmp_path / "sync", parallel=layout, train=train)
    background = recipe(tmp_path / "async", parallel=layout, train={**train, "async_save": True})
    assert run_ranks(fault_checks.sync_then_slow_async, 4, sync, background) == [["", ""]] * 4

    here, there = (list_checkpoints(tmp_path / name / "checkpoints") for name in ("async", "sync"))
    assert [path.name for path in here] == [path.name for path in there] and here[-1].name == "iter_0000007"
    assert not list((tmp_path / "async" / "checkpoints").glob(".*"))
    for mine, other in zip(here, there, strict=True):
        verify(mine)
        assert len(hashes(mine)) >= 4 * 2 and hashes(mine) == hashes(other)

    lines = [json.loads(line) for line in (tmp_path / "async" / "metrics.jsonl").read_text().splitlines()]
    order = [(line["kind"], line["step"]) for line in lines if line["kind"] == "train" or line.get("event") == "checkpoint"]
    assert order.index(("event", 2)) > order.index(("train", 3)), "training waited for the disk"
    saved = [step for kind, step in order if kind == "event"]
    assert saved == [2, 4, 6, 7]

    rest = {**background, "train": {**background["train"], "stop_at_step": 10}}
    whole = recipe(tmp_path / "whole", parallel=layout, train={"eval_interval": 2})
    assert run_ranks(sft_checks.train_twice, 4, rest, whole) == [["", ""]] * 4
    assert curve(tmp_path / "async", "loss", "grad_norm") == curve(tmp_path / "whole", "loss", "grad_norm")
    assert metrics(tmp_path / "async", "eval")[-1]["eval_loss"] == metrics(tmp_path / "whole", "eval")[-1]["eval_loss"]

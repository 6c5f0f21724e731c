"""What only a GPU shows: the same recipe on CUDA and NCCL. Run by `make test-gpu`; not run so far (no device yet)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_moe_trains_on_cuda(tmp_path: Path, precision: str):
    import torch

    assert torch.cuda.is_available(), "make test-gpu needs a CUDA device"
    single = [f"parallel.{axis}_model_parallel_size=1" for axis in ("tensor", "pipeline", "expert")]
    more = ["parallel.sequence_parallel=false", "train.max_steps=60", f"train.precision={precision}", f"output={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "megalign", "sft", "quickstart", *single, *more]
    subprocess.run(command, check=True, timeout=500)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert losses[-1] < 0.5 * losses[0]

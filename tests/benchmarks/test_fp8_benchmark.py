"""The FP8 benchmark without a GPU: its checks run, its table says "not measured", and its timing code runs with a false clock."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks" / "fp8"
sys.path.insert(0, str(FOLDER))
_spec = importlib.util.spec_from_file_location("fp8_benchmark", FOLDER / "run.py")
assert _spec and _spec.loader
run: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(run)


def test_without_a_gpu_it_checks_and_measures_nothing(tmp_path: Path):
    output = tmp_path / "fp8.json"
    done = subprocess.run([sys.executable, str(FOLDER / "run.py"), "--output", str(output), "--seed", "1"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    if torch.cuda.is_available():
        assert result["measured"]["layers"]
        return
    assert result["measured"] is None and "not measured" in done.stdout
    assert set(result["relative errors against float64"]) == {"forward against unquantised", "dgrad against unquantised", "wgrad against unquantised", "matmul against its own FP8 operands"}


def test_all_timing_code_runs_with_a_false_clock():
    calls = []

    def clock(what: Callable[[], Any]) -> float:
        what()
        calls.append(what)
        return 1e-3

    result = run.versions(torch.device("cpu")) | {"seed": 0}
    result["measured"] = run.measured(torch.device("cpu"), clock, [(256, 256, 128, 1.1, 1.3)], (2, 256, 128, 128, 1.1, 1.5), (128, 256), 1e12, copy=2**20)
    table = run.table_of(result)
    kernels = len(result["measured"]["kernels"])
    assert kernels >= 7 and len(calls) == 1 + 3 + 2 + kernels + 4  # copy, three layers, two of experts, kernels, optimizers
    assert "256 -> 128, 256 tokens | 1.00x" in table and "torch.optim.AdamW(fused=True)" in table
    layer = result["measured"]["layers"][0]
    assert layer["saved bytes"]["fp8"] == 256 * 256 + 256 * 256 // 128 * 4 and layer["saved bytes"]["bf16"] == 256 * 256 * 2
    json.dumps(result)


def test_a_wrong_kernel_is_never_timed(monkeypatch: pytest.MonkeyPatch):
    """A silent fallback to BF16 is more exact than FP8 can be: it fails too."""
    monkeypatch.setattr(run.Fp8Linear, "forward", lambda self, x: torch.nn.functional.linear(x, self.weight))
    with pytest.raises(AssertionError, match="forward against unquantised: relative error .* nothing is timed"):
        run.correctness(torch.device("cpu"), 0)

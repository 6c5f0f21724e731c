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
    names = set(result["relative errors against float64"])
    for passes in ("forward", "dgrad", "wgrad"):
        assert {f"{passes} against unquantised", f"experts' {passes} against unquantised"} <= names
    assert {"matmul against its own FP8 operands", "SwiGLU backward in FP8", "log-probs", "entropy"} <= names
    assert "8 experts, 7168 -> 4096, 32768 tokens | not measured" in done.stdout


def test_all_timing_code_runs_with_a_false_clock():
    calls = []

    def clock(what: Callable[[], Any]) -> float:
        what()
        calls.append(what)
        return 1e-3

    result = run.versions(torch.device("cpu")) | {"seed": 0}
    result["measured"] = run.measured(torch.device("cpu"), clock, [(256, 256, 128, 1.1, 1.3)], (2, 256, 128, 128, 1.1, 1.5), (40, 64, 300), (128, 256), 1e12, copy=2**20)
    table = run.table_of(result)
    kernels = len(result["measured"]["kernels"])
    assert kernels >= 11 and len(calls) == 1 + 3 + 2 + kernels + 4  # copy, three layers, two of experts, kernels, optimizers
    assert not any("out" in row for row in result["measured"]["kernels"])
    timed = [row["kernel"] for row in result["measured"]["kernels"]]
    for name in ("quantise rows", "quantise blocks", "RMSNorm", "SwiGLU +", "SwiGLU backward", "re-tiling", "matmul", "wgrad", "grouped matmul", "grouped wgrad", "log-probs of", "log-probs backward"):
        assert any(kernel.startswith(name) for kernel in timed), name  # every kernel of the README has its row
    assert "256 -> 128, 256 tokens | 1.00x" in table and "torch.optim.AdamW(fused=True)" in table
    layer = result["measured"]["layers"][0]
    assert layer["saved bytes"]["fp8"] == 256 * 256 + 256 * 256 // 128 * 4 and layer["saved bytes"]["bf16"] == 256 * 256 * 2
    json.dumps(result)


def test_a_rung_that_fails_or_is_wrong_is_named_and_not_timed():
    good = torch.randn(8, 8)

    def fails() -> torch.Tensor:
        raise RuntimeError("no kernel image\nfor this device")

    assert run.why_wrong(lambda: good, good) is None
    assert run.why_wrong(lambda: good * 1.02, good) == "wrong: relative error 2.0e-02" and run.why_wrong(lambda: good * torch.nan, good)
    assert run.why_wrong(fails, good) == "RuntimeError: no kernel image"
    row = {"kernel": "matmul gluon:0", "out": "wrong: relative error 2.0e-02"}
    assert "| matmul gluon:0 | wrong: relative error 2.0e-02 | |" in run.table_of({"measured": {"layers": [], "kernels": [row], "adamw": []}})


def test_a_failing_torchao_ends_nothing(monkeypatch: pytest.MonkeyPatch):
    class Fails(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("Triton Error [CUDA]: an illegal argument\nmore")

    monkeypatch.setattr(run, "torchao_layer", lambda plain: (Fails(8, 8), ""))
    row, _ = run.time_layers(torch.device("cpu"), lambda what: (what(), 1e-3)[1], [(16, 128, 128, 1.1, 1.3)], (2, 256, 128, 128, 1.1, 1.5))
    assert row["torchao"] == "torchao fails: RuntimeError: Triton Error [CUDA]: an illegal argument" and "torchao" not in row["seconds"] and row["fp8 over bf16"] == 1


def test_a_wrong_kernel_is_never_timed(monkeypatch: pytest.MonkeyPatch):
    """A silent fallback to BF16 is more exact than FP8 can be: it fails too."""
    monkeypatch.setattr(run.Fp8Linear, "forward", lambda self, x: torch.nn.functional.linear(x, self.weight))
    with pytest.raises(AssertionError, match="forward against unquantised: relative error .* nothing is timed"):
        run.correctness(torch.device("cpu"), 0)

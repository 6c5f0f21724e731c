"""Our adapters in PEFT: its loader takes the folder, its eight AdamW steps have our losses, norms and weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

pytestmark = pytest.mark.oracle
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "models"), str(HERE)]
import lora_oracle_checks  # noqa: E402  # pyright: ignore[reportMissingImports]
from test_lora_oracle import MODELS, SIZES  # noqa: E402  # pyright: ignore[reportMissingImports]

STEPS = 8
OPTIMIZER = dict(lr=2e-3, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8, weight_decay=0.01)
LORA = {"rank": 4, "alpha": 6}
CASES = {"llama": LORA, "some": {**LORA, "target_modules": ["q_proj", "v_proj"], "use_rslora": True}, "qwen2": LORA}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """(ours, PEFT's) of every case."""
    import transformers

    out, ours, jobs = tmp_path_factory.mktemp("peft"), {}, []
    for name, lora in CASES.items():
        config, changes = MODELS["llama" if name == "some" else name]
        torch.manual_seed(11)
        base, adapter = str(out / f"{name}-base"), str(out / f"{name}-adapter")
        transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**{**SIZES, **changes})).save_pretrained(base)
        ours[name] = run_ranks(lora_oracle_checks.ours, 1, base, adapter, lora, STEPS, OPTIMIZER)[0]
        rows = [(ids.tolist(), mask.astype(int).tolist()) for ids, mask in lora_oracle_checks.rows(2 * STEPS)]
        jobs.append(dict(base=base, adapter=adapter, rows=rows, batch_size=2, optimizer=OPTIMIZER))
    (out / "job.json").write_text(json.dumps(jobs))
    done = subprocess.run([sys.executable, str(HERE / "peft_steps.py"), str(out / "job.json")], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: (ours[name], theirs) for name, theirs in zip(CASES, json.loads(done.stdout), strict=True)}


@pytest.mark.parametrize("name", CASES)
def test_eight_steps(found: dict[str, tuple[dict[str, Any], dict[str, Any]]], name: str):
    ours, theirs = found[name]
    assert sorted(f"base_model.model.{key}" for key in ours["adapters"]) == theirs["names"], "PEFT trains the same matrices"
    assert sum(tensor.numel() for tensor in ours["adapters"].values()) == theirs["elements"]
    for number, ((loss, norm), (their_loss, their_norm)) in enumerate(zip(ours["steps"], theirs["steps"], strict=True)):
        assert loss == pytest.approx(their_loss, abs=1e-4), number
        assert norm == pytest.approx(their_norm, rel=1e-3), number
    moved = max(float(tensor.abs().max()) for key, tensor in ours["trained"].items() if "lora_B" in key)
    assert moved > 5e-3, "B began at 0"
    for key, tensor in ours["trained"].items():
        assert float((tensor - torch.tensor(theirs["trained"][key])).abs().max()) < 2e-4, key

"""`megalign audit` as a user runs it: 0 where all is well, 1 with names where gradients are left unreduced."""

from __future__ import annotations

import os
import subprocess
import sys

SMALL = [
    "model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=48", "model.moe_ffn_hidden_size=32", "model.vocab_size=300",
    "parallel.pipeline_model_parallel_size=1",
]  # fmt: skip


def audit(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "megalign", "audit", "quickstart", *SMALL, *arguments], capture_output=True, text=True, env=environment, timeout=300)


def test_a_sound_recipe_passes():
    done = audit()
    assert done.returncode == 0, done.stderr
    assert "probe: gradients agree with the loss" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("1 groups, 0 drift")
    row = next(line for line in done.stdout.splitlines() if line.startswith("decoder.layers.*.mlp.router.weight"))
    assert "tensor: partial (hook in backward)" in row and "data_context: partial (megatron DDP)" in row


def test_unreduced_gradients_are_named_with_exit_code_1():
    """The expert-parallel group is the tensor group here: routers and norms keep their own tokens' gradients."""
    done = audit("parallel.unsynchronised=[expert_parallel]", "parallel.use_distributed_optimizer=false", "--no-probe", "--steps", "1")
    assert done.returncode == 1
    assert "decoder.layers.1.mlp.router.weight over tensor" in done.stdout and "a sum is missing since step 1" in done.stdout
    assert 'declare(router.weight, tensor="partial")' in done.stdout
    assert "local_experts" not in done.stdout.split("parameters placed")[1]
    assert "findings" in done.stderr and "Traceback" not in done.stderr

"""Each patch to megatron-core is still needed: its upstream line stands, and without it something breaks."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import layout_checks
import pytest
import torch
from ranks import run_ranks

from megalign.parallel.patches import MEGATRON_VERSION, PATCHES, install

MOE = dict(num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_moe_experts=4, moe_aux_loss_coeff=0.01)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_the_upstream_line_stands(patch: Any):
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None and spec.origin is not None
    lines = (Path(spec.origin).parent / patch.file).read_text().splitlines()
    assert patch.snippet in lines[patch.line - 1], f"{patch.file}:{patch.line} is now {lines[patch.line - 1].strip()!r}; is the patch still needed?"


# Where each patch is missed, and what the probe then shows; healthy: {"isolated": True, "compiled": False, "helpers": 0, "adam_steps": [2.0]}.
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "expert": {"expert_model_parallel_size": 2},
    "cut experts": {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 2,
    },
}
MISSED = {
    "device": ("one", "Torch not compiled with CUDA enabled|Cannot re-initialize CUDA|No CUDA GPUs|Found no NVIDIA driver"),
    "tensor-methods": ("one", "Wrapped parameters must be one of torch.cuda.FloatTensor"),
    "rng": ("one", "'isolated': False"),
    "split-sizes": ("expert", "incompatible function arguments"),
    "uneven-collectives": ("cut experts", "ProcessGroupGloo::allgather: invalid tensor size"),
    "te-gemm-name": ("one", "NameError.*te_general_gemm"),
    "results-queue": ("one", "'helpers': 1"),
    "optimizer-state-step": ("one", "KeyError: 'step'"),
    "optimizer-shared-step": ("one", r"'adam_steps': \[[^2]"),
}
ELSEWHERE = {
    "no-compile",  # below
    "reduce-strided",
    "bucket-padding",  # tests/parallel/test_layouts.py
    "rotary-copies",  # tests/parallel/test_copies.py
    "lone-reduction",
    "padded-z-loss",  # tests/models/test_moe.py
    "empty-aux-loss",
    "padded-expert-bias",  # tests/models/test_expert_bias.py
    "group-scores",
    "latent-attention-te",
    "block-padding",  # tests/parallel/test_recompute.py
    "recompute-without-te",
}
WORLD = {"one": 1, "expert": 2, "cut experts": 4}


def probe(layout: dict[str, Any], folder: str) -> str:
    """Two steps of a small MoE with a save and a load between them: what is to be seen, or the error."""
    try:
        return str(layout_checks.step_save_load_step(MOE, layout, Path(folder)))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_patches_together_suffice(layout: str, tmp_path: Path):
    found = run_ranks(probe, WORLD[layout], LAYOUTS[layout], str(tmp_path))
    assert found == [str({"isolated": True, "compiled": False, "helpers": 0, "adam_steps": [2.0]})] * WORLD[layout]


@pytest.mark.skipif(torch.cuda.is_available(), reason="most patches stand for a missing CUDA")
@pytest.mark.parametrize("patch", [patch for patch in PATCHES if patch.name in MISSED], ids=lambda patch: patch.name)
def test_without_the_patch_it_breaks(patch: Any, tmp_path: Path):
    layout, symptom = MISSED[patch.name]
    before = functools.partial(install, skip=[patch.name])
    found = run_ranks(probe, WORLD[layout], LAYOUTS[layout], str(tmp_path), before=before, abandon=True)
    assert re.search(symptom, " ".join(map(str, found))), found


COMPILED = """
import sys, tempfile, warnings
warnings.simplefilter("ignore")
if sys.argv[1] == "before us":
    import megatron.core.models.gpt
import torch
from megalign.parallel.init import init, shutdown
from megalign.parallel.patches import install
# The other patch replaces the only compiled function that this model reaches.
install(skip=["padded-expert-bias", *sys.argv[2:]])
inductor = "torch._inductor.compile_fx" in sys.modules
init()
import test_patches
print("inductor", inductor, test_patches.probe({}, tempfile.mkdtemp()))
if inductor:
    from torch._dynamo.utils import counters
    from megalign.parallel.cpu import no_compile
    from megalign.parallel.grid import destroy_grid
    counters.clear()
    no_compile()
    destroy_grid()
    print("then", test_patches.probe({}, tempfile.mkdtemp()))
shutdown()
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA it is meant to compile")
def test_nothing_is_compiled_and_the_compiler_is_not_imported():
    """In processes of their own: the ranks of the other tests are forks of one that has imported already."""

    def found(*arguments: str) -> list[str]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parents[2])]), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", COMPILED, *arguments], capture_output=True, text=True, env=environment, timeout=240)
        assert done.returncode == 0, done.stderr
        return [line for line in done.stdout.splitlines() if line.startswith(("inductor", "then"))]

    (ours,) = found("by us")
    assert ours.startswith("inductor False") and "'compiled': False" in ours
    without, then = found("before us", "no-compile")
    assert without.startswith("inductor True") and "'compiled': True" in without
    assert "'compiled': False" in then and "Error" not in then


def strided_gradient() -> float:
    """The gradient of a copied tensor whose ranks have 1 and 2 as theirs, cut out of a wider gradient."""
    from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

    from megalign.parallel.grid import create_grid

    grid = create_grid(tensor_model_parallel_size=2)
    x = torch.zeros(3, 2, requires_grad=True)
    torch.cat([copy_to_tensor_model_parallel_region(x, group=grid.tensor.group), torch.zeros(3, 5)], dim=-1).backward(
        torch.full((3, 7), 1.0 + grid.rank)
    )
    assert x.grad is not None
    return float(x.grad[0, 0])


def test_strided_gradients_are_summed():
    assert run_ranks(strided_gradient, 2) == [3, 3]
    without = functools.partial(install, skip=["reduce-strided"])
    assert run_ranks(strided_gradient, 2, before=without) == [1, 2]


def test_every_patch_has_its_test():
    assert {patch.name for patch in PATCHES} == MISSED.keys() | ELSEWHERE


def test_the_version_is_checked(monkeypatch: pytest.MonkeyPatch):
    import importlib.metadata

    from megalign.parallel import patches

    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.99")
    with pytest.raises(RuntimeError, match=f"0.99.*{MEGATRON_VERSION}"):
        patches.install()

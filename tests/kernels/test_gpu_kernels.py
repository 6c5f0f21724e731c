"""The checks of the interpreter on a real GPU (make test-gpu), and the rungs that only a GPU can run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import checks
import pytest
import torch
from mutants import mutant

from megalign.kernels import backends, matmul, quantise, wgrad

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Hopper's FP8 tensor cores keep about 14 bits within a step. Not measured yet: tighten when it is.
    monkeypatch.setattr(checks, "EXACT", 1e-3)
    torch.manual_seed(0)
    with torch.device("cuda"):
        yield


def test_quantisation_is_exact():
    for x in [*checks.quantise_inputs(), checks.uneven(1000, 4096).bfloat16(), checks.uneven(4096, 2000)]:
        checks.check_quantise(quantise, x)


@pytest.mark.parametrize("config", matmul.CONFIGS, ids=str)
def test_matmul(config: matmul.MatmulConfig):
    for m, n, k in [(128, 192, 128), (130, 330, 256), (1000, 520, 384), (4096, 2048, 640), (100, 77, 200)]:
        checks.check_matmul(matmul, m, n, k, config)
        checks.check_matmul(matmul, m, n, k, config, torch.bfloat16)
    checks.check_promotion(matmul, config)


@pytest.mark.parametrize("config", wgrad.CONFIGS, ids=str)
def test_wgrad(config: wgrad.WgradConfig):
    for m, n, k in [(128, 128, 128), (4000, 520, 1000), (300, 77, 37)]:
        checks.check_wgrad(wgrad, m, n, k, config)
        checks.check_wgrad(wgrad, m, n, k, config, torch.randn(n, k))
        checks.check_wgrad(wgrad, m, n, k, config, torch.randn(n, k).bfloat16())


@pytest.mark.parametrize("configs", list(zip(matmul.CONFIGS, wgrad.CONFIGS)), ids=str)
def test_grouped(configs: tuple[matmul.MatmulConfig, wgrad.WgradConfig]):
    checks.check_grouped(matmul, wgrad, [300, 0, 1, 4000, 0], 520, 384, configs)


@pytest.mark.parametrize("operation", backends.TUNED)
def test_every_rung_of_this_machine_agrees_with_the_reference(operation: backends.Operation):
    device = torch.device("cuda", torch.cuda.current_device())
    row = backends.tune(operation, 1024, 2048, 1024, device, torch.bfloat16, lambda run: (run(), 1.0)[1])
    assert not row.out, row.out
    assert len(row.seconds) == len(backends.candidates(operation, 1024, 2048, 1024, device))


def test_a_lost_promotion_is_seen(tmp_path: Path):
    rounded = "y0 = (y0 + partial0 * (x_scale * tl.load(scale0 + k))[:, None]).to(tl.bfloat16).to(tl.float32)"
    broken = mutant(matmul, tmp_path, "y0 += partial0 * (x_scale * tl.load(scale0 + k))[:, None]", rounded)
    with pytest.raises(AssertionError):
        checks.check_matmul(broken, 256, 256, 2048, matmul.CONFIGS[2])

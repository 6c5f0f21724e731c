"""MFU arithmetic against PaLM's published figures; the measured peak leaves the run alone."""

import os
import subprocess
import sys
import time

import pytest
import torch

from megalign.config.schema import ModelConfig
from megalign.config.size import Counts
from megalign.models.presets import PRESETS
from megalign.trainer.mfu import flops_per_token
from megalign.trainer.peaks import (
    _best_seconds,
    device_peak_flops,
    measured_cpu,
    model_flops_per_token,
    model_flops_utilization,
)


def test_palm_540b_reaches_its_published_utilisation():
    """arXiv 2204.02311, section 4.1 and table 1: 238.3k tokens/s on 6144 TPU v4 (275 TFLOP/s each) is 46.2 % MFU."""
    flops = model_flops_per_token(
        540_350_000_000, num_layers=118, num_attention_heads=48, kv_channels=256, sequence_length=2048
    )
    share = model_flops_utilization(238_300, flops, peak_flops=275e12, num_devices=6144)
    assert share == pytest.approx(0.462, abs=5e-4)


def test_the_embedding_lookup_multiplies_nothing():
    shape = {"num_layers": 2, "num_attention_heads": 4, "kv_channels": 8, "sequence_length": 16.0}
    assert model_flops_per_token(1000, embedding_parameters=400, **shape) == 6 * 600 + 12 * 2 * 4 * 8 * 16


def test_latent_attention_multiplies_heads_of_two_sizes():
    """Scores 2 S (32 + 16) and values 2 S 32 FLOPs a head and token, three times with backward; tiny-mla-moe has 4 layers."""
    model = ModelConfig.model_validate(PRESETS["tiny-mla-moe"])
    statistics = {"rows_kept": 1, "tokens": 100, "sequence_length": 100}
    attention = 3 * 4 * model.num_attention_heads * (2 * 48 + 2 * 32) * 100
    counts = Counts(total=0, active=0, by_part={})
    assert flops_per_token(model, counts, statistics) == attention


def test_the_peak_is_plausible_remembered_and_leaves_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    peak = device_peak_flops(torch.float32, "cpu")
    assert torch.equal(torch.rand(3), expected)
    assert 1e9 < peak < 1e14
    started = time.perf_counter()
    assert device_peak_flops(torch.float32, "cpu") == peak
    assert time.perf_counter() - started < 0.05


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux ties a process to a core")
def test_a_core_that_is_shared_has_the_peak_of_one_that_is_not():
    """Another process on the same core halves what the wall clock sees; the peaks of the plan are of this thread."""
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    core = {min(cores)}
    torch.set_num_threads(1)
    os.sched_setaffinity(0, core)
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])  # on the same core, which it inherits
    try:
        time.sleep(0.3)
        on_the_wall = 2 * 1536**3 / _best_seconds(1536, torch.float32, torch.device("cpu"))
        measured = measured_cpu(1, "fp32").fp32
    finally:
        busy.kill()
        busy.wait()
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)
    assert on_the_wall < 0.75 * measured

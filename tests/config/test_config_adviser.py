"""The adviser lists what passes the validator and fits, fastest first; the page shows its arithmetic."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from megalign.cli import app
from megalign.config.adviser import advise
from megalign.config.errors import ConfigError
from megalign.config.hardware import DEVICES
from megalign.config.load import apply_overrides
from megalign.config.memory import memory_per_rank
from megalign.config.rules import check
from megalign.config.schema import Recipe
from megalign.models.presets import PRESETS
from megalign.planner import plan

H100 = DEVICES["h100-80gb"]


def recipe(preset: str, batch: int = 128, sequence: int = 4096) -> Recipe:
    return Recipe.model_validate(
        {"model": PRESETS[preset], "data": {"sequence_length": sequence}, "train": {"precision": "bf16", "global_batch_size": batch}}
    )


@pytest.mark.parametrize("device,links,each", [("a100-80gb", 12, 25), ("h100-80gb", 18, 25), ("h200-141gb", 18, 25), ("b200-180gb", 18, 50)])
def test_wires_are_counted_one_way(device, links, each):
    """NVLink of generations 3, 4 and 5: so many links, so many GB/s in each direction. A data sheet adds both."""
    assert DEVICES[device].link == links * each * 1e9


@pytest.mark.parametrize("preset,gpus,algorithm", [("llama3-8b", 8, "sft"), ("llama3-8b", 16, "ppo"), ("mixtral-8x7b", 32, "dpo")])
def test_what_is_listed_passes_the_validator_and_fits(preset, gpus, algorithm):
    given = recipe(preset)
    rows = PRESETS[preset]["vocab_size"]
    advice = advise(given, rows, gpus, H100, algorithm=algorithm)
    assert advice.candidates and len(advice.candidates) + advice.refused + advice.too_large == advice.tried
    times = [candidate.time.total for candidate in advice.candidates]
    assert times == sorted(times)
    for candidate in advice.candidates[:: max(1, len(times) // 20)]:
        written = apply_overrides(given, candidate.overrides())  # what the page tells to write is what was weighed
        check(written, gpus)
        assert written.parallel == candidate.recipe.parallel and written.train == candidate.recipe.train
        stages = memory_per_rank(written, rows, gpus, algorithm=algorithm)
        assert max(stage["total"] for stage in stages) == candidate.memory <= 0.9 * 80e9


def test_what_the_validator_refuses_is_not_listed():
    """12 rows a step: no share for 8 data ranks."""
    given = recipe("llama3-8b", batch=12)
    advice = advise(given, PRESETS["llama3-8b"]["vocab_size"], 16, H100)
    assert advice.refused and advice.candidates and 8 not in {candidate.layout.dp for candidate in advice.candidates}
    for candidate in advice.candidates:
        check(candidate.recipe, 16)


def test_what_cannot_fit_says_by_how_much():
    advice = advise(recipe("llama3-70b"), 128256, 8, H100)
    # 18 bytes a parameter over 8 GPUs at best: 70.55e9 * 18 / 8 = 159 GB
    assert not advice.candidates and advice.smallest is not None and 159e9 < advice.smallest.memory < 200e9


def test_a_prime_number_of_layers_gets_a_shorter_last_stage():
    given = recipe("llama3-70b")
    given.model.num_layers = 61
    advice = advise(given, 128256, 64, H100)
    uneven = [c.recipe.parallel for c in advice.candidates if c.layout.pp == 4]
    assert uneven and all(parallel.num_layers_in_last_pipeline_stage == 61 - 3 * 16 for parallel in uneven)


def test_tensor_parallelism_stays_in_the_node():
    """Two nodes of eight, one node of sixteen: only the wire differs, and the wide group is not even tried."""
    assert all(candidate.layout.tp <= 8 for candidate in advise(recipe("llama3-8b"), 128256, 16, H100).candidates)


def test_long_rows_are_cut():
    short, long = (advise(recipe("llama3-8b", 32, length), 128256, 16, H100) for length in (4096, 32768))
    assert {c.layout.cp for c in short.candidates} == {1}
    assert {c.layout.cp for c in long.candidates} > {1}


def page(*arguments, **keys) -> str:
    console = Console(width=200, file=io.StringIO(), record=True)
    plan(*arguments, console=console, **keys)
    return console.export_text()


def test_the_page_of_the_adviser():
    text = page("llama3-70b", ["train.global_batch_size=256"], gpus=64, gpu="h100-80gb", sequence_length=4096, top=3)
    assert "data sheet: NVIDIA H100 SXM" in text and "351 layouts tried" in text
    assert "train.recompute_modules=[core_attn,layernorm]" in text  # brackets survive rich
    assert "FLOPs / (9.89e+14 * 0.6)" in text and "70.55B parameters" in text


def test_the_page_of_a_recipe_names_the_models():
    text = page("mixtral-8x7b", ["parallel.expert_model_parallel_size=8"], algorithm="ppo")
    assert "ppo: policy, critic, reference, reward" in text and "all_to_all" in text and "active" in text


def test_json_and_the_command():
    arguments = ["plan", "llama3-8b", "--gpus", "8", "--gpu", "h100-80gb", "--sequence-length", "4096", "--json", "--top", "2"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert len(found["layouts"]) == 2 and found["best"]["parameters"]["total"] == 8030261248
    assert found["layouts"][0]["seconds_a_step"] == pytest.approx(found["best"]["step_time"]["total"])
    micro = sum(found["best"]["step_time"][part] for part in ("matmul", "memory", "communication"))
    time = found["best"]["step_time"]
    assert time["total"] == pytest.approx((time["microbatches"] + time["bubble"]) * micro + time["replicas"] + time["optimizer"])


@pytest.mark.parametrize(
    "arguments,keys,words",
    [
        (("llama3-8", []), {}, "or a preset: .*did you mean llama3-8b"),
        (("llama3-8b", []), {"gpus": 8}, "--gpu=null: is needed with --gpus; give one of a100-40gb"),
        (("llama3-8b", []), {"gpus": 8, "gpu": "h100-80"}, "did you mean h100-80gb"),
        (("llama3-8b", []), {"algorithm": "kto"}, "is none of sft, dpo, ppo, grpo"),
    ],
)
def test_mistakes(arguments, keys, words):
    with pytest.raises(ConfigError, match=f"(?s){words}"):
        plan(*arguments, **keys)

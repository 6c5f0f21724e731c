"""The printed plan, and that it needs neither torch nor megatron."""

from __future__ import annotations

import io
import subprocess
import sys

from rich.console import Console
from rich.text import Text

from megalign.config.plan import describe_plan, human_bytes, human_count
from megalign.config.schema import Recipe
from megalign.models.presets import PRESETS


def printed(recipe: Recipe, *arguments) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(describe_plan(recipe, *arguments))
    return console.export_text()


def row(text: str, label: str) -> str:
    (line,) = (line for line in text.splitlines() if line.startswith(label))
    return line[len(label) :].strip()


def test_a_plan_of_a_large_model():
    recipe = Recipe.model_validate(
        {
            "model": {"preset": "qwen3-30b-a3b", **PRESETS["qwen3-30b-a3b"]},
            "parallel": {
                "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "expert_model_parallel_size": 8,
                "sequence_parallel": True,
            },
            "train": {"precision": "bf16", "micro_batch_size": 2, "global_batch_size": 64, "max_steps": 100},
            "data": {"sequence_length": 4096},
        }
    )  # fmt: skip
    text = printed(recipe, 32)
    assert "30.53B  (30,532,122,624)" in text
    assert row(text, "active").startswith("3.35B")
    assert "memory of one rank (32 ranks, bf16)" in text and "stage 1" in text and "stage 2" not in text
    assert row(text, "layout") == "tp(2) * pp(2) * cp(1) * dp(8) = 32 ranks; experts: etp(1) * ep(8) * dp(2) * pp(2)"
    assert row(text, "effective batch") == "micro(2) * microbatches(4) * dp(8) = 64 rows a step"
    assert row(text, "steps") == "100"
    assert row(text, "tokens") == "26,214,400 = 100 steps * 64 rows * 4096 positions"
    assert "warning: model.moe_aux_loss_coeff=0" in text


def test_steps_come_from_the_data_when_epochs_decide():
    recipe = Recipe.model_validate({"train": {"epochs": 2}})
    assert "their number is known when the data is read" in row(printed(recipe), "steps")
    rows = {"packs": 20, "tokens": 5000, "scored_tokens": 2000, "vocab_size": 500}
    text = printed(recipe, 1, rows, Text("<|im_start|>user"))
    assert row(text, "epoch") == "20 packs, 5,000 tokens, 2,000 scored tokens"
    assert row(text, "steps") == "6"  # ceil(20 / 8) = 3 an epoch
    assert row(text, "vocabulary").startswith("500 ids in 512 rows")
    assert text.rstrip().endswith("<|im_start|>user")
    assert "active" not in text  # dense: nothing idle


def test_a_scaled_learning_rate_shows_both():
    recipe = Recipe.model_validate({"optimizer": {"lr": 2e-4, "scale_lr_with_data_parallel": "linear"}})
    assert row(printed(recipe, 4), "learning rate").startswith("0.0008, cosine to 0, 0 warmup steps (0.0002 scaled linear by dp(4))")


def test_the_plan_loads_neither_torch_nor_megatron():
    code = """
import sys, time
from rich.console import Console
from megalign.config.load import load_recipe, list_recipes
from megalign.config.plan import describe_plan
from megalign.config.rules import check
from megalign.config.schema import Recipe
recipe = Recipe()
check(recipe)
Console(width=120).print(describe_plan(recipe))
heavy = {"torch", "megatron", "transformers", "numpy"} & set(sys.modules)
sys.exit(f"imported: {heavy}" if heavy else f"took {time.process_time():.1f} s" if time.process_time() > 1 else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "micro(1) * microbatches(8) * dp(1) = 8 rows a step" in done.stdout


def test_units():
    assert human_count(30532122624) == "30.53B"
    assert [human_count(n) for n in (0, 999, 1000, 2_500_000)] == ["0", "999", "1.00K", "2.50M"]
    assert human_bytes(141_107_412_992) == "141.1 GB"
    assert [human_bytes(n) for n in (0, 999, 1500, 2_000_000, 3_000_000_000_000)] == ["0 B", "999 B", "1.5 kB", "2.0 MB", "3.0 TB"]


def test_prediction_modules_and_what_counts_as_active_are_said():
    model = {**PRESETS["deepseek-v3"], "mtp_num_layers": 1}
    text = printed(Recipe.model_validate({"model": model, "parallel": {"pipeline_model_parallel_size": 61}}))
    assert "682.64B  (682,636,472,320)" in text and row(text, "mtp").startswith("11.61B")
    assert row(text, "without mtp").startswith("671.03B  (prediction modules share embedding and head")
    assert row(text, "active").endswith("(all but the experts a token does not choose, and the prediction modules)")

"""P19: the models of an algorithm, and what they add to a rank. (Live tensors: tests/trainer/test_memory.py.)"""

from __future__ import annotations

from typing import Any

import pytest

from megalign.config.memory import memory_per_rank, models_of
from megalign.config.schema import Recipe
from megalign.models.presets import PRESETS


def recipe(preset: str = "llama3-8b", *, parallel: dict | None = None, **train: Any) -> Recipe:
    return Recipe.model_validate(
        {"model": PRESETS[preset], "parallel": parallel or {}, "data": {"sequence_length": 4096},
         "train": {"precision": "bf16", "global_batch_size": 64, **train}}
    )  # fmt: skip


@pytest.mark.parametrize("algorithm,reward_model,count", [("sft", False, 1), ("dpo", False, 2), ("ppo", False, 4), ("grpo", False, 2), ("grpo", True, 3)])
def test_models_of_an_algorithm(algorithm, reward_model, count):
    """P19: PPO 4, DPO 2, GRPO 2 with a verifier or 3 with a reward model."""
    models = models_of(algorithm, reward_model)
    assert len(set(models)) == len(models) == count
    (alone,) = memory_per_rank(recipe(), 128256, 8)
    (rank,) = memory_per_rank(recipe(), 128256, 8, algorithm=algorithm, reward_model=reward_model)
    states = sum(alone[part] for part in ("weights", "gradients", "masters", "moments"))
    trained = 1 + (algorithm == "ppo")
    assert rank["total"] == trained * states + (count - trained) * alone["weights"] + max(rank["activations"], rank.get("kv_cache", 0))


def test_a_pair_has_two_rows():
    alone, pair = (memory_per_rank(recipe(), 128256, 8, algorithm=algorithm)[0]["activations"] for algorithm in ("sft", "dpo"))
    assert pair == pytest.approx(2 * alone, rel=0.1)  # past 2^26 logits only a chunk of the head lives


def test_the_cache_of_rollouts():
    """Llama-3-8B: 32 layers * 8 groups * 128 channels * 2 (key and value) * 2 bytes = 131072 bytes a token."""
    (rank,) = memory_per_rank(recipe(), 128256, 8, algorithm="grpo")
    assert rank["kv_cache"] == 131072 * 4096 * 64 // 8
    (cut,) = memory_per_rank(recipe(parallel={"tensor_model_parallel_size": 8}), 128256, 8, algorithm="grpo")
    assert cut["kv_cache"] == 131072 // 8 * 4096 * 64


def test_recomputation_is_worth_its_name():
    """Full recomputation of Llama-3-8B: one hidden state a layer, and one layer whole (arXiv:2205.05198, section 5)."""
    full = recipe(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    selective = recipe(recompute_granularity="selective", recompute_modules=["core_attn", "layernorm"])
    kept, some, least = (memory_per_rank(given, 128256, 8)[0]["activations"] for given in (recipe(), selective, full))
    assert least < some < kept
    boundaries = 32 * 4096 * 4096 * 2
    assert boundaries < least < boundaries + kept / 32 + 2.1e9


@pytest.mark.parametrize("layers,keys", [(61, {"num_layers_in_last_pipeline_stage": 13}), (61, {"pipeline_model_parallel_layout": "Et*20|t*20|t*20|tL"})])
def test_uneven_stages_hold_the_model_between_them(layers, keys):
    parallel = {"pipeline_model_parallel_size": 4, **keys}
    given = recipe(parallel=parallel)
    given.model.num_layers = layers
    stages = memory_per_rank(given, 128256, 4)
    even = recipe()
    even.model.num_layers = layers
    assert sum(stage["parameters"] for stage in stages) == memory_per_rank(even, 128256, 1)[0]["parameters"]
    last = 13 if "num_layers_in_last_pipeline_stage" in keys else 1
    assert stages[1]["parameters"] * last == pytest.approx((stages[3]["parameters"] - 128256 * 4096) * (16 if last == 13 else 20), rel=1e-3)

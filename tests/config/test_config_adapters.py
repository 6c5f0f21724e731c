"""LoRA in a recipe: counts in closed form, names, memory, what is refused and what is warned about."""

from __future__ import annotations

from typing import Any

import pytest

from megalign.config.adapters import count_adapters, linear_layers, scale, targets
from megalign.config.advice import warnings
from megalign.config.errors import ConfigError
from megalign.config.memory import memory_per_rank
from megalign.config.rules import check
from megalign.config.schema import LoraConfig, ModelConfig, Recipe
from megalign.models.presets import PRESETS


def recipe(model: dict[str, Any] | None = None, parallel: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    return Recipe.model_validate({"model": model or {}, "parallel": parallel or {}, **sections})


def test_a_square_matrix_of_4096_at_rank_16():
    """S2: 131,072 = 16 * (4096 + 4096)."""
    model = ModelConfig(num_layers=1, hidden_size=4096, num_attention_heads=32)
    assert count_adapters(model, LoraConfig(rank=16, target_modules=["o_proj"])) == 131_072
    assert count_adapters(model, LoraConfig(rank=16, target_modules="q_proj")) == 131_072


def test_llama_3_8b_has_the_parameters_that_peft_prints():
    """r 16 on all linear layers: 41,943,040 trainable parameters, 32 * 16 * (8192 + 5120 + 5120 + 8192 + 3 * 18432)."""
    assert count_adapters(ModelConfig(**PRESETS["llama3-8b"]), LoraConfig(rank=16)) == 41_943_040


def test_scale():
    assert scale(LoraConfig(rank=16, alpha=8)) == 0.5 and scale(LoraConfig(rank=16)) == 2.0
    assert scale(LoraConfig(rank=16, alpha=8, use_rslora=True)) == 2.0


def test_names_are_pefts_and_megatrons():
    model = ModelConfig(num_moe_experts=4, moe_layer_freq=[0, 1, 1, 1])
    assert targets(model, LoraConfig(rank=1, target_modules=["linear_qkv", "w2"])) == {"q_proj", "k_proj", "v_proj", "down_proj"}
    assert targets(model, LoraConfig(rank=1)) == {layer.name for layer in linear_layers(model, experts=False)}
    latent = ModelConfig(multi_latent_attention=True, q_lora_rank=8)
    assert targets(latent, LoraConfig(rank=1)) == {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_pefts_spelling_is_understood():
    lora = recipe(lora={"r": 8, "lora_alpha": 4, "lora_dropout": 0.1}).lora
    assert (lora.rank, lora.alpha, lora.dropout) == (8, 4, 0.1)
    with pytest.raises(ValueError, match="r"):
        recipe(lora={"r": 8, "rank": 4})


@pytest.mark.parametrize(
    "parallel",
    [{}, {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2, "data_parallel_size": 2}],
    ids=["one", "tp2", "pp2", "tp2-ep2-etp2-dp2"],
)
def test_the_plan_counts_adapters_alone_as_trained(parallel: dict[str, Any]):
    moe = dict(num_moe_experts=4, moe_ffn_hidden_size=64, moe_layer_freq=[0, 1, 1, 0]) if "expert_model_parallel_size" in parallel else {}
    given = {"train": {"precision": "bf16", "global_batch_size": 8}}
    whole, some = (memory_per_rank(recipe(moe, parallel, lora=lora, **given), 512) for lora in ({}, {"rank": 4}))
    held = 0
    for before, after in zip(whole, some, strict=True):
        added = after["adapters"]
        assert after["weights"] == before["weights"] + 2 * added and after["gradients"] == 4 * added
        ranks = parallel.get("data_parallel_size", 1)
        assert after["masters"] == pytest.approx(4 * added / ranks, rel=0.5) and after["moments"] == 2 * after["masters"]
        assert after["total"] == sum(after[part] for part in ("weights", "gradients", "masters", "moments", "activations"))
        held += added
    if not moe and "tensor_model_parallel_size" not in parallel:
        assert held == count_adapters(recipe().model, LoraConfig(rank=4))


def test_dpo_against_the_base_holds_one_model():
    given: dict[str, Any] = {"lora": {"rank": 4}}
    two, one = (memory_per_rank(recipe(dpo={"reference": how}, **given), 512, algorithm="dpo")[0] for how in ("model", "base"))
    assert "reference" not in one and two["total"] - one["total"] == two["reference"] > 0


@pytest.mark.parametrize(
    "sections, field, words",
    [
        ({"lora": {"rank": 4, "target_modules": ["q_poj"]}}, "lora.target_modules", "the model has no linear layer 'q_poj'; it has all-linear, q_proj"),
        ({"lora": {"rank": 4, "target_modules": ["q_poj"]}}, "lora.target_modules", "did you mean q_proj"),
        ({"lora": {"rank": 4, "target_modules": ["kv_b_proj"]}}, "lora.target_modules", "no linear layer 'kv_b_proj'"),
        ({"lora": {"rank": 4, "target_modules": []}}, "lora.target_modules", "names nothing to adapt"),
        ({"lora": {"alpha": 4}}, "lora.alpha", "lora.rank is null and all weights are trained"),
        ({"dpo": {"reference": "base"}}, "dpo.reference", "it has none: lora.rank is null"),
        ({"dpo": {"reference": "base", "reference_from": "x"}, "lora": {"rank": 4}}, "dpo.reference_from", "the model's own base"),
        ({"dpo": {"reference": "base"}, "lora": {"rank": 4, "modules_to_save": ["output_layer"]}}, "lora.modules_to_save", "only them off"),
    ],
)
def test_what_is_refused(sections: dict[str, Any], field: str, words: str):
    with pytest.raises(ConfigError) as caught:
        check(recipe(**sections))
    assert any(problem.field == field and words in str(problem) for problem in caught.value.problems), str(caught.value)


def test_transformer_engine_is_refused():
    with pytest.raises(ConfigError, match="set that to local"):
        check(recipe({"transformer_impl": "transformer_engine"}, lora={"rank": 4}))


@pytest.mark.parametrize("lr, rank, expected", [(1e-5, 16, "below the usual 0.0001 to 0.0003 of LoRA"), (2e-4, 16, None), (1e-3, 16, "above the usual 0.0001 to 0.0003 of LoRA"), (2e-4, None, "above the usual 1e-06 to 5e-05 of full")])
def test_learning_rates_have_ranges_of_their_own(lr: float, rank: int | None, expected: str | None):
    """S5."""
    lines = [line for line in warnings(recipe({"init_from": "x"}, lora={"rank": rank}, optimizer={"lr": lr})) if line.startswith("optimizer.lr")]
    assert lines == [] if expected is None else expected in lines[0]


def test_adapters_on_random_weights_are_warned_about():
    assert any("the frozen weights are random" in line for line in warnings(recipe(lora={"rank": 4})))

"""Parameter counts against published totals and transformers' own models; memory against bytes a parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megalign.config.memory import memory_per_rank
from megalign.config.schema import ModelConfig, Recipe
from megalign.config.size import count_parameters
from megalign.models.presets import PRESETS


def model_of(preset: str, **keys: Any) -> ModelConfig:
    return ModelConfig.model_validate({**PRESETS[preset], **keys})


@pytest.mark.parametrize(
    "preset,total,active",
    [  # billions, as the model cards give them
        ("llama3-8b", 8.03, 8.03),
        ("llama3-70b", 70.55, 70.55),
        ("qwen3-30b-a3b", 30.53, 3.3),
        ("mixtral-8x7b", 46.70, 12.9),
        ("deepseek-v3", 671.03, 37.0),
    ],
)
def test_published_counts(preset, total, active):
    model = model_of(preset)
    assert model.vocab_size is not None
    counts = count_parameters(model, model.vocab_size)
    assert counts.total / 1e9 == pytest.approx(total, rel=1e-3)
    assert counts.active / 1e9 == pytest.approx(active, rel=0.03)
    assert sum(counts.by_part.values()) == counts.total


def test_published_counts_of_the_prediction_module():
    """DeepSeek-V3's README_WEIGHTS: 11.5B of its own; the hub's 685B hold its copies of embedding and head (0.9B each) too."""
    counts = count_parameters(model_of("deepseek-v3", mtp_num_layers=1), 129280)
    main = count_parameters(model_of("deepseek-v3"), 129280)
    assert counts.by_part["mtp"] / 1e9 == pytest.approx(11.5, rel=0.01)
    assert counts.total - counts.by_part["mtp"] == main.total and counts.active == main.active
    assert (counts.total + counts.by_part["embedding"] + counts.by_part["output"]) / 1e9 == pytest.approx(685, rel=1e-3)


HF = {"num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 130}
OURS = {"num_layers": 3, "hidden_size": 48, "ffn_hidden_size": 80, "num_attention_heads": 4, "num_query_groups": 2}
MOE = {"num_moe_experts": 5, "moe_router_topk": 2, "moe_ffn_hidden_size": 36}


LATENT_HF = {"num_key_value_heads": 4, "kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10}
LATENT_HF |= {"first_k_dense_replace": 1, "n_routed_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 36, "n_shared_experts": 2}
LATENT = {"num_query_groups": None, "multi_latent_attention": True, "kv_lora_rank": 20, "qk_head_dim": 12, "qk_pos_emb_head_dim": 8}
LATENT |= {"v_head_dim": 10, "moe_layer_freq": [0, 1, 1], **MOE, "moe_shared_expert_intermediate_size": 72}


@pytest.mark.parametrize(
    "family,config,ours",
    [
        ("llama", {}, {}),
        ("llama", {"tie_word_embeddings": True}, {"share_embeddings_and_output_weights": True}),
        ("qwen3", {"head_dim": 20}, {"kv_channels": 20, "qk_layernorm": True}),
        ("mixtral", {"intermediate_size": 36, "num_local_experts": 5}, MOE),
        (
            "qwen3_moe",
            {"head_dim": 20, "moe_intermediate_size": 36, "num_experts": 5, "num_experts_per_tok": 2},
            {**MOE, "kv_channels": 20, "qk_layernorm": True},
        ),
        ("qwen2", {}, {"add_qkv_bias": True}),
        (
            "gpt2",
            {"n_layer": 3, "n_embd": 48, "n_head": 4, "n_inner": 80, "n_positions": 30},
            {"num_query_groups": None, "normalization": "LayerNorm", "gated_linear_unit": False, "activation_func": "gelu_tanh"}
            | {"add_bias_linear": True, "position_embedding_type": "learned_absolute", "max_position_embeddings": 30}
            | {"share_embeddings_and_output_weights": True},
        ),
        ("deepseek_v2", LATENT_HF | {"q_lora_rank": None}, LATENT),
        ("deepseek_v3", LATENT_HF | {"q_lora_rank": 24}, LATENT | {"q_lora_rank": 24}),
    ],
)
def test_counts_are_those_of_transformers(family, config, ours):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**HF, **config}))
    ours = {**OURS, **ours}
    counts = count_parameters(ModelConfig.model_validate(ours), HF["vocab_size"])
    assert counts.total == sum(parameter.numel() for parameter in model.parameters())
    experts = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    assert counts.by_part.get("experts", 0) == experts
    assert counts.active == counts.total - experts * 3 // 5


def test_shared_experts_are_always_active():
    with_shared = count_parameters(model_of("tiny-moe", moe_shared_expert_intermediate_size=50), 100)
    without = count_parameters(model_of("tiny-moe"), 100)
    assert with_shared.total - without.total == with_shared.active - without.active == 4 * 3 * 128 * 50


def recipe(preset: str, *, precision: str = "bf16", model: dict | None = None, **parallel: Any) -> Recipe:
    names = {"tp": "tensor", "pp": "pipeline", "vpp": "virtual_pipeline"}
    keys = {f"{names[key]}_model_parallel_size" if key in names else key: value for key, value in parallel.items()}
    return Recipe.model_validate(
        {"model": {**PRESETS[preset], **(model or {})}, "parallel": keys, "train": {"precision": precision, "global_batch_size": 64}}
    )


def test_a_70b_in_bf16_is_140_gb():
    (rank,) = memory_per_rank(recipe("llama3-70b"), 128256)
    assert rank["weights"] == pytest.approx(140e9, rel=0.01)


@pytest.mark.parametrize(
    "precision,distributed,ranks,expected",
    [  # bytes a parameter, from the table in Megatron-LM's guide to its distributed optimizer (FP32 gradients)
        ("bf16", False, 8, 18),
        ("bf16", True, 8, 6 + 12 / 8),
        ("fp32", False, 8, 16),
        ("fp32", True, 8, 8 + 8 / 8),
        ("bf16", True, 1, 18),
    ],
)
def test_bytes_of_a_parameter(precision, distributed, ranks, expected):
    given = recipe("tiny-dense", precision=precision, use_distributed_optimizer=distributed)
    (rank,) = memory_per_rank(given, 4096, ranks)
    states = rank["total"] - rank["activations"]
    assert states / rank["parameters"] == pytest.approx(expected, rel=1e-3)
    assert rank["parameters"] == count_parameters(given.model, 4096).total


def test_context_ranks_share_the_optimizer_too():
    alone, four = (memory_per_rank(recipe("tiny-dense", context_parallel_size=cp), 4096, 4)[0] for cp in (1, 2))
    assert alone["moments"] == four["moments"]  # dp 4 cp 1, dp 2 cp 2


def test_experts_share_the_optimizer_over_their_own_ranks():
    """On 8 ranks with EP 4: everything but the experts over 8, the experts (a quarter each) over 2."""
    given = recipe("tiny-moe", expert_model_parallel_size=4)
    counts = count_parameters(given.model, 4096)
    experts = counts.by_part["experts"]
    (rank,) = memory_per_rank(given, 4096, 8)
    assert rank["parameters"] == counts.total - experts + experts // 4
    assert rank["masters"] == 4 * ((counts.total - experts) // 8 + experts // 4 // 2)
    assert rank["moments"] == 2 * rank["masters"]


@pytest.mark.parametrize("preset", ["tiny-dense", "tiny-moe", "tiny-mla-moe", "qwen3-30b-a3b"])
@pytest.mark.parametrize("tied", [False, True])
def test_ranks_together_hold_the_model(preset, tied):
    """Summed over tensor ranks and stages: each parameter once, replicated ones tp times, a tied table once more."""
    tp, pp = 2, 2
    given = recipe(preset, model={"share_embeddings_and_output_weights": tied}, tp=tp, pp=pp, sequence_parallel=True)
    parts = count_parameters(given.model, 4096).by_part
    held = tp * sum(stage["parameters"] for stage in memory_per_rank(given, 4096))
    model = given.model
    down = model.kv_lora_rank + model.qk_pos_emb_head_dim + (model.q_lora_rank or 0)  # MLA's down projections
    latent = model.num_layers * model.hidden_size * down if model.multi_latent_attention else 0
    replicated = parts["norms"] + parts.get("router", 0) + latent
    experts = parts.get("experts", 0)  # etp is 1: every tensor rank holds all of them
    copies = (tp - 1) * (replicated + experts) + (parts["embedding"] if tied else 0)
    assert held == sum(parts.values()) + copies


def test_prediction_modules_stand_on_the_last_stage():
    """With a copy of the embedding there; their layer is cut like the others, their projection by rows."""
    plain, given = (recipe("tiny-mla-moe", model={"mtp_num_layers": depth}, tp=2, pp=2, sequence_parallel=True) for depth in (None, 2))
    without, with_modules = (memory_per_rank(each, 4096) for each in (plain, given))
    assert with_modules[0]["parameters"] == without[0]["parameters"]
    model = given.model
    down = 128 * (model.kv_lora_rank + model.qk_pos_emb_head_dim + (model.q_lora_rank or 0))
    norms = 5 * 128 + model.kv_lora_rank + (model.q_lora_rank or 0)
    attention = 64 * 4 * 48 + 32 * 4 * 64 + 4 * 32 * 128  # up projections and output
    experts, shared, router, projection = 8 * 3 * 128 * 96, 3 * 128 * 96, 8 * 128, 2 * 128 * 128
    module = norms + router + experts + down + (attention + shared + projection) // 2
    assert with_modules[1]["parameters"] - without[1]["parameters"] == 2 * module + 4096 // 2 * 128


def test_activations_follow_the_schedule():
    def activations(**keys: Any) -> list[int]:
        return [stage["activations"] for stage in memory_per_rank(recipe("tiny-dense", model={"num_layers": 8}, **keys), 128)]

    one = activations()[0]
    first, second = activations(pp=2)
    logits = 256 * (128 * 2 + 128 * 2 + 128 * 4)  # final norm, scored positions, FP32 logits of 128 rows
    # 1F1B: pp microbatches in flight on stage 0, of 1/pp of the layers each; one on the last, and the logits.
    assert first == pytest.approx(one - logits) and second == pytest.approx(first / 2 + logits)
    chunks = activations(pp=2, vpp=2)[0] / first  # interleaved: (2 (pp - 1) + (vpp - 1) pp + 1) / (pp vpp) = 5 / 4
    assert chunks == pytest.approx(5 / 4)
    assert activations(tp=2)[0] < one and activations(tp=2, sequence_parallel=True)[0] < activations(tp=2)[0]


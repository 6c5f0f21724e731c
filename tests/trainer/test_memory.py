"""P19: the plan's memory against the live tensors of real training steps, part by part, within 10 %."""

from __future__ import annotations

from typing import Any

import pytest
from memory_checks import beside_the_policy, measure
from ranks import run_ranks

from megalign.config.memory import memory_per_rank
from megalign.config.schema import Recipe

VOCABULARY = 500
DENSE = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 160, "num_attention_heads": 4, "num_query_groups": 2}
MOE = {
    **DENSE, "qk_layernorm": True, "num_moe_experts": 4, "moe_ffn_hidden_size": 96, "moe_shared_expert_intermediate_size": 64,
    "moe_aux_loss_coeff": 0.01,
}  # fmt: skip
UNIFORM = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
LATENT = {
    **DENSE, "num_query_groups": None, "multi_latent_attention": True, "q_lora_rank": 48, "kv_lora_rank": 40, "qk_head_dim": 24,
    "qk_pos_emb_head_dim": 8, "v_head_dim": 20,
}  # fmt: skip
GPT2 = {
    **DENSE, "num_query_groups": 4, "normalization": "LayerNorm", "activation_func": "gelu_tanh", "gated_linear_unit": False,
    "add_bias_linear": True, "position_embedding_type": "learned_absolute", "share_embeddings_and_output_weights": True,
}  # fmt: skip
AHEAD = {**MOE, "mtp_num_layers": 2}
PARTS = ("weights", "gradients", "masters", "moments", "activations")


def case(model: dict[str, Any], parallel: dict[str, Any], **train: Any) -> dict[str, Any]:
    names = {"tp": "tensor_model_parallel_size", "pp": "pipeline_model_parallel_size", "vpp": "virtual_pipeline_model_parallel_size",
             "ep": "expert_model_parallel_size", "cp": "context_parallel_size", "sp": "sequence_parallel"}  # fmt: skip
    keys = {names.get(key, key): value for key, value in parallel.items()}
    return {"model": model, "parallel": keys, "data": {"sequence_length": 256}, "train": {"global_batch_size": 4, **train}}


def selective(*modules: str) -> dict[str, Any]:
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


CASES = {
    1: [
        case(DENSE, {}),
        case(DENSE, {}, precision="bf16"),
        case(DENSE, {"use_distributed_optimizer": False}, precision="bf16"),
        case({**DENSE, "num_query_groups": 4}, {}),
        case({**DENSE, "share_embeddings_and_output_weights": True}, {}, micro_batch_size=2),
        case(MOE, {}),
        case(MOE, {}, precision="bf16"),
        case(DENSE, {}, **UNIFORM),
        case(DENSE, {}, **{**UNIFORM, "recompute_num_layers": 2}),
        case(DENSE, {}, **{**UNIFORM, "recompute_method": "block", "recompute_num_layers": 3}),
        case(DENSE, {}, **selective("core_attn")),
        case(DENSE, {}, **selective("layernorm")),
        case(DENSE, {}, **selective("mlp")),
        case(MOE, {}, **selective("moe")),
        case(MOE, {}, **selective("shared_experts", "layernorm")),
        case(AHEAD, {}),
        case(AHEAD, {}, precision="bf16", **UNIFORM),
    ],
    2: [
        case(DENSE, {"tp": 2}),
        case(MOE, {"ep": 2}, precision="bf16"),
        case(DENSE, {"pp": 2, "vpp": 2}),
    ],
    4: [
        case(DENSE, {"tp": 2, "pp": 2, "sp": True}, precision="bf16"),
        case(DENSE, {"tp": 2, "pp": 2}, **UNIFORM),
        case(AHEAD, {"tp": 2, "pp": 2, "sp": True, "ep": 2}),
        case({**MOE, "num_layers": 5}, {"tp": 2, "pp": 2, "sp": True, "ep": 2, "num_layers_in_first_pipeline_stage": 3}),
    ],
}  # fmt: skip


@pytest.mark.parametrize("model", [LATENT, GPT2], ids=["latent attention", "GPT-2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_of_other_families(model: dict[str, Any], precision: str):
    """One document a row: the CPU's latent attention keeps scores over the document."""
    given = case(model, {}, precision=precision)
    (found,) = run_ranks(measure, 1, [(given, VOCABULARY)], 1)[0]
    (planned,) = memory_per_rank(Recipe.model_validate(given), VOCABULARY, 1, device="cpu")
    assert planned["activations"] == pytest.approx(found["activations"], rel=0.1)


@pytest.mark.parametrize("world", CASES)
def test_planned_memory_is_measured_memory(world: int):
    ranks = run_ranks(measure, world, [(given, VOCABULARY) for given in CASES[world]])
    wrong = []
    for number, given in enumerate(CASES[world]):
        planned = memory_per_rank(Recipe.model_validate(given), VOCABULARY, world, device="cpu")
        for found in (rank[number] for rank in ranks):
            plan = planned[found["stage"]]
            wrong += [
                f"{given['parallel']} {given['train']} stage {found['stage']} {part}: planned {plan[part]:,}, measured {found[part]:,}"
                for part in PARTS
                if plan[part] != pytest.approx(found[part], rel=0.1)
            ]
    assert not wrong, "\n".join(wrong)


BESIDE = {
    1: [case(DENSE, {}, ema_decay=0.9), case(MOE, {}, precision="bf16", ema_decay=0.9), case(LATENT, {}, ema_decay=0.9)],
    2: [case(DENSE, {"tp": 2, "sp": True}, ema_decay=0.9), case(MOE, {"ep": 2}, precision="bf16", ema_decay=0.9)],
    4: [case({**MOE, "num_layers": 5}, {"tp": 2, "pp": 2, "sp": True, "ep": 2, "num_layers_in_first_pipeline_stage": 3}, ema_decay=0.9)],
}  # fmt: skip


@pytest.mark.parametrize("world", BESIDE)
def test_what_stands_beside_the_policy_is_measured_too(world: int):
    """The average, a second model as reference, and the cache as rollouts allocate it: to 1 %."""
    ranks = run_ranks(beside_the_policy, world, [(given, VOCABULARY) for given in BESIDE[world]])
    for number, given in enumerate(BESIDE[world]):
        dpo, grpo = (memory_per_rank(Recipe.model_validate(given), VOCABULARY, world, algorithm=name, device="cpu") for name in ("dpo", "grpo"))
        for found in (rank[number] for rank in ranks):
            stage = found["stage"]
            planned = {"average": dpo[stage]["average"], "reference": dpo[stage]["reference"], "kv_cache": grpo[stage]["kv_cache"]}
            measured = {part: found[part] for part in planned}
            assert measured == pytest.approx(planned, rel=0.01), (given["parallel"], given["train"], stage)
            assert all(measured.values())

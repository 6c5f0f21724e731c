"""What the layout matrix (test_layout_matrix.py) rests on: its comparison can fail, and P14, the sharded optimizer.

The oracle is one process on the same microbatches, not a stored number. Tolerances are those of requirement P13.
"""

from __future__ import annotations

import functools
from functools import cache
from pathlib import Path
from typing import Any

import layout_checks
import pytest
import torch
from ranks import run_ranks

from megalign.parallel.patches import install

DENSE = dict(num_layers=4, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2)
TIED = {**DENSE, "share_embeddings_and_output_weights": True, "qk_layernorm": True}
MOE = {
    **DENSE,
    "qk_layernorm": True,
    "num_moe_experts": 4,
    "moe_ffn_hidden_size": 48,
    "moe_shared_expert_intermediate_size": 32,
    "moe_aux_loss_coeff": 0.01,
    "moe_z_loss_coeff": 1e-3,
}
LEARNED = {  # GPT-2
    "num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "normalization": "LayerNorm",
    "activation_func": "gelu_tanh", "gated_linear_unit": False, "add_bias_linear": True,
    "position_embedding_type": "learned_absolute", "share_embeddings_and_output_weights": True,
}  # fmt: skip
BIASED = {**DENSE, "add_qkv_bias": True, "rope_type": "yarn", "rotary_scaling_factor": 4.0, "original_max_position_embeddings": 16}
LATENT = {  # DeepSeek-V3
    "num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "multi_latent_attention": True,
    "q_lora_rank": 24, "kv_lora_rank": 20, "qk_head_dim": 12, "qk_pos_emb_head_dim": 8, "v_head_dim": 10,
    "rope_type": "yarn", "rotary_scaling_factor": 4.0, "original_max_position_embeddings": 16, "mscale_all_dim": 1.0,
    "num_moe_experts": 8, "moe_ffn_hidden_size": 48, "moe_shared_expert_intermediate_size": 32, "moe_layer_freq": [0, 1, 1, 1],
    "moe_router_topk": 3, "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True,
    "moe_router_num_groups": 4, "moe_router_group_topk": 2, "moe_router_topk_scaling_factor": 2.5, "moe_aux_loss_coeff": 0.01,
}  # fmt: skip
MODELS = {"dense": DENSE, "tied": TIED, "moe": MOE, "allgather": {**MOE, "moe_token_dispatcher_type": "allgather"}}
MODELS |= {"learned": LEARNED, "biased": BIASED, "latent": LATENT}
MODELS |= {"mtp": {**LATENT, "mtp_num_layers": 2}, "mtp-dense": {**DENSE, "mtp_num_layers": 1}}
TP2 = dict(tensor_model_parallel_size=2, sequence_parallel=True)
PP2 = dict(pipeline_model_parallel_size=2)

@cache
def one_process(model: str, multiple: int) -> dict[str, Any]:
    return run_ranks(layout_checks.gradients, 1, MODELS[model], {}, {"document_multiple": multiple})[0]


def worst_gradient(found: dict[str, Any], expected: dict[str, Any]) -> tuple[float, str]:
    """Largest difference in units of P13's tolerance, 1e-5 max|g| + 1e-9, and its parameter."""
    assert found["grads"].keys() == expected["grads"].keys()
    return max(
        (float((found["grads"][name] - g).abs().max() / (1e-5 * g.abs().max() + 1e-9)), name) for name, g in expected["grads"].items()
    )


def test_a_lost_reduction_is_seen():
    """The comparison can fail: RMSNorm weights without their attribute are not summed over tensor ranks."""
    expected = one_process("moe", 1)
    found = run_ranks(layout_checks.gradients_without_norm_reduction, 2, MOE, TP2, {})[0]
    ratio, name = worst_gradient(found, expected)
    assert ratio > 1000 and "layernorm" in name


def test_latent_attention_sums_the_rotary_key_that_all_heads_share():
    """P2: its gradient is whole with and without sequence parallelism; not without our sum, nor with upstream's cut down projections."""
    dense = {key: value for key, value in LATENT.items() if "moe" not in key}
    expected = run_ranks(layout_checks.gradients, 1, dense, {}, {})[0]
    bare = {**TP2, "sequence_parallel": False}
    for check, layout in ((layout_checks.gradients_without_key_sum, bare), (layout_checks.gradients_with_cut_down_projections, TP2)):
        ratio, name = worst_gradient(run_ranks(check, 2, dense, layout, {})[0], expected)
        assert ratio > 100, (ratio, name)
    before = functools.partial(install, skip=["reduce-strided"])  # the key's gradient is a slice
    ratio, name = worst_gradient(run_ranks(layout_checks.gradients, 2, dense, bare, {}, before=before)[0], expected)
    assert ratio > 100, (ratio, name)
    for layout in (TP2, bare):
        ratio, name = worst_gradient(run_ranks(layout_checks.gradients, 2, dense, layout, {})[0], expected)
        assert ratio <= 1, f"{name}: {ratio:.1f} times the tolerance"


def test_distributed_optimizer_equals_the_unsharded_one():
    """P14: five steps, two data-parallel ranks, optimizer state sharded or not."""
    options = {"steps": 5, "weights": True}
    plain, sharded = (
        run_ranks(layout_checks.gradients, 2, MOE, {}, {**options, "use_distributed_optimizer": sharded})[0] for sharded in (False, True)
    )
    assert plain["losses"] == pytest.approx(sharded["losses"], rel=1e-6)
    for name, weight in plain["weights"].items():
        torch.testing.assert_close(sharded["weights"][name], weight, rtol=0, atol=2e-5)


@pytest.mark.parametrize("patched", [True, False], ids=["patched", "without the bucket-padding patch"])
def test_a_checkpoint_of_overlapped_buckets(patched: bool, tmp_path: Path):
    """Several buckets, one of them padded, and parameters of which a rank has its shard alone until the next forward: the
    checkpoint made then holds the step, and one rank that opens it the same weights."""
    smooth = {"lr": 1e-2, "adam_eps": 1e-2}
    how = {**smooth, "overlap": True, "overlap_param_gather": True, "bucket_size": 5000}
    before = functools.partial(install, skip=[] if patched else ["bucket-padding"])
    saved = run_ranks(layout_checks.weights_of_checkpoint, 2, DENSE, {}, {}, tmp_path, None, how, before=before)[0]
    opened = run_ranks(layout_checks.weights_of_checkpoint, 1, DENSE, {}, {}, tmp_path, saved["path"], smooth, before=before)[0]
    expected = run_ranks(layout_checks.gradients, 1, DENSE, {}, {"weights": True, "run": smooth})[0]["weights"]
    for name, weight in expected.items():
        torch.testing.assert_close(saved["weights"][name], weight, rtol=0, atol=1e-6)
    wrong = [name for name, weight in expected.items() if not torch.allclose(opened["weights"][name], weight, rtol=0, atol=1e-6)]
    assert wrong == [] if patched else wrong
    if patched:
        assert saved["loss"] == pytest.approx(opened["loss"], rel=1e-6)

"""LoRA against transformers in FP64 whose weights are W + alpha / r B A: loss, and the gradient of every A and B (by autograd)."""

from __future__ import annotations

import math
import re
from typing import Any

import lora_oracle_checks
import pytest
import torch
from lora_oracle_checks import VOCAB, rows
from ranks import run_ranks

SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, initializer_range=0.1, eos_token_id=None, bos_token_id=None,
)  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek": (
        "DeepseekV2Config",
        dict(
            num_key_value_heads=4, q_lora_rank=24, kv_lora_rank=20, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10, n_routed_experts=4,
            num_experts_per_tok=2, moe_intermediate_size=32, n_shared_experts=1, first_k_dense_replace=1, topk_method="greedy",
        ),
    ),
}  # fmt: skip
LORA = {"rank": 4, "alpha": 6, "use_rslora": True}
SCALE = 6 / math.sqrt(4)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, dict[str, Any]]]:
    """transformers' model and what ours makes of its folder, by name; one launch."""
    import transformers

    models, folders = {}, {}
    for name, (config, changes) in MODELS.items():
        torch.manual_seed(11)
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**{**SIZES, **changes}, experts_implementation="eager"), attn_implementation="eager")
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
        models[name] = model.double().eval()
    results = run_ranks(lora_oracle_checks.several, 1, [str(folder) for folder in folders.values()], LORA)[0]
    return {name: (models[name], result) for name, result in zip(models, results, strict=True)}


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients(found: dict[str, tuple[Any, dict[str, Any]]], name: str):
    model, result = found[name]
    factors = {key: tensor.double().requires_grad_() for key, tensor in result["adapters"].items()}
    weights = merged(dict(model.named_parameters()), factors)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for ids, mask in rows(2):
        tokens = torch.from_numpy(ids).long()[None]
        logits = torch.func.functional_call(model, weights, (tokens,), {"use_cache": False}).logits[0, :-1]
        scored = torch.from_numpy(mask)[1:]
        total = total + torch.nn.functional.cross_entropy(logits[scored], tokens[0, 1:][scored], reduction="sum")
        count += int(scored.sum())
    loss = total / count
    assert count > 20 and result["loss"] == pytest.approx(loss.item(), rel=1e-5)
    grads = dict(zip(factors, torch.autograd.grad(loss, list(factors.values())), strict=True))
    assert grads.keys() == result["grads"].keys() and len(grads) > 20
    for key, expected in grads.items():
        assert float(expected.abs().max()) > 0, key
        assert float((result["grads"][key] - expected).abs().max()) <= 5e-5 * float(expected.abs().max()) + 1e-9, key


def merged(parameters: dict[str, torch.Tensor], factors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """W + scale B A; of experts, which transformers 5 stacks, in their place: gate (w1), then up (w3), and down (w2)."""
    changed: dict[str, Any] = {key: value.detach() for key, value in parameters.items()}
    stacked: dict[str, dict[tuple[str, int], torch.Tensor]] = {}
    for key in (key for key in factors if key.endswith(".lora_A.weight")):
        path = key.removesuffix(".lora_A.weight")
        delta = SCALE * factors[f"{path}.lora_B.weight"] @ factors[key]
        if f"{path}.weight" in changed:
            changed[f"{path}.weight"] = changed[f"{path}.weight"] + delta
        else:
            found = re.fullmatch(r"(.*)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)", path)
            assert found, path
            stacked.setdefault(f"{found[1]}.mlp.experts", {})[found[3], int(found[2])] = delta
    for prefix, deltas in stacked.items():
        count = 1 + max(expert for _, expert in deltas)
        gate, up, down = (("w1", "w3", "w2") if ("w1", 0) in deltas else ("gate_proj", "up_proj", "down_proj"))
        both = torch.stack([torch.cat([deltas[gate, expert], deltas[up, expert]]) for expert in range(count)])
        changed[f"{prefix}.gate_up_proj"] = changed[f"{prefix}.gate_up_proj"] + both
        changed[f"{prefix}.down_proj"] = changed[f"{prefix}.down_proj"] + torch.stack([deltas[down, expert] for expert in range(count)])
    return changed



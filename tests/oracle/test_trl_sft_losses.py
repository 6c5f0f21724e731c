"""The conventions that trl_sft_losses.py states, against a plain torch loop written from them."""

import copy
import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from trl_sft_losses import trl_sft_losses  # pyright: ignore[reportMissingImports]

pytestmark = pytest.mark.oracle

BATCH, ACCUMULATION, STEPS = 2, 2, 8
SETTINGS = {"lr": 5e-3, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1, "clip_grad": 0.5}


@pytest.fixture(scope="module")
def model():
    """A Mixture of experts with norms on queries and keys: the most that there is to get wrong."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=24,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4,
        num_experts_per_tok=2, tie_word_embeddings=False, router_aux_loss_coef=0.5, output_router_logits=True,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module")
def rows():
    """Lengths and shares of scored tokens that differ much, so that a mean of means is another number."""
    rng = random.Random(0)
    rows = []
    for _ in range(BATCH * ACCUMULATION * STEPS):
        ids = [rng.randrange(64) for _ in range(rng.randrange(4, 24))]
        first = rng.randrange(len(ids) - 2)  # 0 among them: a label that is no target
        rows.append({"input_ids": ids, "labels": [-100] * first + ids[first:]})
    return rows


def test_losses_and_norms_follow_from_the_stated_conventions(model, rows, tmp_path):
    model.save_pretrained(tmp_path)
    found = trl_sft_losses(
        tmp_path, rows, batch_size=BATCH, gradient_accumulation_steps=ACCUMULATION, steps=STEPS, **SETTINGS
    )
    assert found["scored_tokens"][0] == sum(label != -100 for row in rows[:4] for label in row["labels"][1:])
    assert all("norm" in name for name in found["no_decay"])
    assert {name.rpartition(".weight")[0] for name in found["no_decay"]} == {
        *(
            f"model.layers.{n}.{name}"
            for n in (0, 1)
            for name in ("input_layernorm", "post_attention_layernorm")
        ),
        *(f"model.layers.{n}.self_attn.{name}" for n in (0, 1) for name in ("q_norm", "k_norm")),
        "model.norm",
    }
    loss, grad_norm = plain_torch(copy.deepcopy(model), rows, set(found["no_decay"]))
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["grad_norm"] == pytest.approx(grad_norm, rel=1e-4)


def plain_torch(model, rows, no_decay):
    decay = [p for name, p in model.named_parameters() if name not in no_decay]
    rest = [p for name, p in model.named_parameters() if name in no_decay]
    moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in (*decay, *rest)}
    losses, norms = [], []
    for step in range(STEPS):
        batch = rows[step * BATCH * ACCUMULATION :][: BATCH * ACCUMULATION]
        total, count = torch.zeros(()), 0
        for row in batch:  # one at a time: no padding at all
            logits = model(torch.tensor([row["input_ids"]]), output_router_logits=False).logits[0]
            logprobs = logits[:-1].float().log_softmax(-1)
            for t, label in enumerate(row["labels"][1:]):
                if label != -100:
                    total, count = total - logprobs[t, label], count + 1
        (total / count).backward()
        norm = torch.stack([p.grad.square().sum() for p in moments]).sum().sqrt()
        scale = min(1.0, SETTINGS["clip_grad"] / (norm.item() + 1e-6))
        with torch.no_grad():
            for p, (m, v) in moments.items():
                g = p.grad * scale
                p -= SETTINGS["lr"] * (SETTINGS["weight_decay"] if any(p is q for q in decay) else 0) * p
                (b1, b2), t = SETTINGS["betas"], step + 1
                m.mul_(b1).add_(g, alpha=1 - b1)
                v.mul_(b2).add_(g * g, alpha=1 - b2)
                p -= SETTINGS["lr"] * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + SETTINGS["eps"])
                p.grad = None
        losses.append((total / count).item())
        norms.append(norm.item())
    return losses, norms


def test_too_few_rows_is_refused(rows):
    with pytest.raises(ValueError, match=r"9 steps of 2 \* 2 rows need 36, but there are 32"):
        trl_sft_losses("nowhere", rows, batch_size=2, gradient_accumulation_steps=2, steps=9)

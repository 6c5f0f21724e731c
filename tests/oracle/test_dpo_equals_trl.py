"""DPO step by step equals TRL's DPOTrainer: loss, rewards, margins, log-probs and gradient norm over 8 steps.

The same Hugging Face folder, pairs of hh_harmless as the same token ids, order and AdamW settings. Tolerances of the oracle
conventions: absolute 1e-4 for losses, relative 1e-5 for sums of log-probs. A Llama on one rank (the two answers of a pair on
one copy of their prompt, or each with its own), TP2, PP2, CP2, TP2 x PP2; a Qwen3-MoE, whose experts transformers computes,
on one rank and EP2. ipo besides.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import run_ranks

pytestmark = pytest.mark.oracle
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "end_to_end"), str(HERE)]
import dpo_checks  # noqa: E402
from test_sft_equals_trl import llama_folder  # noqa: E402
from trl_dpo_steps import NAMES  # noqa: E402

STEPS, BATCH = 8, 4
OPTIMIZER = dict(lr=3e-4, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8, weight_decay=0.01, clip_grad=1.0, lr_decay_style="constant")
TP2, PP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}, {"pipeline_model_parallel_size": 2}
LAYOUTS = {
    "one": (1, {}, {}),
    "one-apart": (1, {}, {"share_prompt": False}),
    "one-model": (1, {}, {"reference": "model"}),
    "one-ipo": (1, {}, {"loss": "ipo"}),
    "tp2": (2, TP2, {}),
    "pp2": (2, PP2, {}),
    "cp2": (2, {"context_parallel_size": 2}, {}),
    "tp2-pp2": (4, {**TP2, **PP2}, {}),
    "moe-one": (1, {}, {}),
    "moe-ep2": (2, {"expert_model_parallel_size": 2}, {}),
    "moe-ep2-model": (2, {"expert_model_parallel_size": 2}, {"reference": "model"}),
}


@pytest.fixture(scope="module")
def setting(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The recipe of all runs, what TRL makes of the same pairs, and our runs on every layout."""
    from megalign.config.schema import Recipe
    from megalign.data.pairs import build_pairs

    folder, experts, out = (tmp_path_factory.mktemp(name) for name in ("llama", "qwen3-moe", "runs"))
    base = {
        "model": {"init_from": str(folder)},
        "data": dict(
            train=str(shared_data / "hh_harmless" / "pairs.jsonl.gz"), max_rows=60, validation_rows=0, sequence_length=1024, shuffle=False,
            max_bad_share=0.5, tokenizer=dict(vocab_size=1024),
        ),
        "optimizer": OPTIMIZER,
        "train": dict(micro_batch_size=1, global_batch_size=BATCH, max_steps=STEPS, sample_prompts=0),
        "logging": dict(tensorboard=False, report=False),
    }  # fmt: skip
    train, _ = build_pairs(Recipe.model_validate({**base, "model": {}, "output": str(out / "tokenizer")}))
    train.tokenizer.save(folder)
    train.tokenizer.save(experts)
    llama_folder(folder, train.tokenizer.vocab_size)
    moe_folder(experts, train.tokenizer.vocab_size)
    pairs = [as_trl(pair) for pair in (train.rows[i] for i in range(STEPS * BATCH))]
    job = dict(model=str(folder), pairs=pairs, batch_size=BATCH, steps=STEPS, lr=OPTIMIZER["lr"])
    file = tmp_path_factory.mktemp("job") / "job.json"
    file.write_text(json.dumps([job, {**job, "loss": "ipo"}, {**job, "model": str(experts)}]))
    done = subprocess.run([sys.executable, str(HERE / "trl_dpo_steps.py"), str(file)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stderr[-2000:]
    sigmoid, ipo, moe = json.loads(done.stdout)
    for world in (1, 2, 4):
        recipes = [
            {**base, "output": str(out / name), "parallel": parallel, "dpo": dpo, "model": {"init_from": str(experts if "moe" in name else folder)}}
            for name, (size, parallel, dpo) in LAYOUTS.items()
            if size == world
        ]
        assert run_ranks(dpo_checks.train_all, world, recipes, timeout=500)[0] == [""] * len(recipes)
    return {"recipe": base, "out": out, "sigmoid": sigmoid, "ipo": ipo, "moe": moe}


def moe_folder(folder: Path, vocab_size: int) -> None:
    """A random tiny Qwen3-MoE without auxiliary loss: transformers takes it over all layers at once, megatron-core layer by layer."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=96, moe_intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True, router_aux_loss_coef=0.0,
        max_position_embeddings=1024, tie_word_embeddings=False,
    )  # fmt: skip
    config.head_dim = 16  # transformers' default is 128
    model = Qwen3MoeForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.1)
        elif ".mlp.gate." in name:
            torch.nn.init.normal_(parameter, 0.0, 0.3)  # far from ties, which rounding would settle
    model.save_pretrained(folder)


def as_trl(pair: list[Any]) -> dict[str, list[int]]:
    """Token ids as TRL has them after tokenisation: a prompt, and answers up to their end-of-turn token."""
    found = {}
    for name, example in zip(("chosen_ids", "rejected_ids"), pair, strict=True):
        scored = np.flatnonzero(example.loss_mask)
        assert len(scored) == scored[-1] - scored[0] + 1, "an answer of several turns: TRL would score the user's too"
        prompt = example.input_ids[: scored[0]].tolist()
        assert found.setdefault("prompt_ids", prompt) == prompt
        found[name] = example.input_ids[scored[0] : scored[-1] + 1].tolist()
    return found


def compare(ours: list[tuple[Any, ...]], trl: dict[str, list[float]]) -> float:
    """Largest difference in units of its tolerance."""
    worst = 0.0
    for index, (_, *values) in enumerate(ours):
        for name, value in zip(NAMES, values, strict=True):
            expected = trl[name][index]
            allowed = 1e-3 * abs(expected) if name == "grad_norm" else 1e-5 * abs(expected) if name.startswith("logps") else 1e-4
            if name.startswith("rewards/"):  # beta times a difference of two such sums
                allowed = 0.1 * 2e-5 * abs(trl["logps/chosen"][index]) + 1e-4
            worst = max(worst, abs(value - expected) / allowed)
    return worst


@pytest.mark.parametrize("layout", LAYOUTS)
def test_eight_steps(setting: dict[str, Any], layout: str):
    ours = dpo_checks.curve(setting["out"] / layout, *NAMES)
    assert len(ours) == STEPS
    trl = setting["ipo" if layout.endswith("ipo") else "moe" if layout.startswith("moe") else "sigmoid"]
    assert compare(ours, trl) <= 1, [(row, [trl[name][i] for name in NAMES]) for i, row in enumerate(ours)]
    assert abs(trl["rewards/margins"][-1]) > 0.02, "the policy has moved: the comparison means something"


def test_the_comparison_can_fail(setting: dict[str, Any], tmp_path: Path):
    """A learning rate 10 % higher, hinge for sigmoid, another beta, one pair in another place: each is seen."""
    base = setting["recipe"]
    changes = [
        {"optimizer": {**OPTIMIZER, "lr": 3.3e-4}},
        {"dpo": {"loss": "hinge"}},
        {"dpo": {"beta": 0.11}},
        {"data": {**base["data"], "shuffle": True}},
    ]
    recipes = [{**base, **change, "output": str(tmp_path / str(number))} for number, change in enumerate(changes)]
    assert run_ranks(dpo_checks.train_all, 1, recipes)[0] == [""] * len(recipes)
    for number in range(len(changes)):
        assert compare(dpo_checks.curve(tmp_path / str(number), *NAMES), setting["sigmoid"]) > 10

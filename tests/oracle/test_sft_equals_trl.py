"""Our SFT losses and gradient norms, step by step, are those of TRL's SFTTrainer: one rank and TP2 x PP2.

Same Hugging Face folder, rows, order and AdamW settings; conventions in trl_sft_losses.py. Tolerance of the oracle
conventions: absolute 1e-4 for losses.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

pytestmark = pytest.mark.oracle
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "end_to_end"))
import sft_checks  # noqa: E402

STEPS, BATCH = 8, 4
OPTIMIZER = dict(lr=1e-3, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8, weight_decay=0.01, clip_grad=1.0)


def llama_folder(folder: Path, vocab_size: int) -> None:
    """A random tiny Llama with norms that are not one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.1)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def setting(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The recipe, and what TRL makes of the same rows."""
    from megalign.config.schema import Recipe
    from megalign.data.dataset import build_datasets

    folder = tmp_path_factory.mktemp("llama")
    base = {
        "model": {"init_from": str(folder)},
        "data": dict(
            train=str(shared_data / "roleplay" / "roleplay.json"), max_rows=2 * STEPS * BATCH, validation_rows=0,
            sequence_length=512, packing=False, shuffle=False, tokenizer=dict(vocab_size=1024),
        ),
        "optimizer": {**OPTIMIZER, "lr_decay_style": "constant"},
        "train": dict(micro_batch_size=1, global_batch_size=BATCH, max_steps=STEPS, sample_prompts=0),
        "logging": dict(tensorboard=False, report=False),
    }  # fmt: skip
    first = Recipe.model_validate({**base, "model": {}})
    train, _ = build_datasets(first)
    train.tokenizer.save(folder)
    llama_folder(folder, train.tokenizer.vocab_size)
    rows = []
    for (example,) in train.rows:
        labels = [int(token) if scored else -100 for token, scored in zip(example.input_ids, example.loss_mask, strict=True)]
        rows.append({"input_ids": example.input_ids.tolist(), "labels": labels})
    job = dict(model=str(folder), rows=rows, batch_size=BATCH, steps=STEPS, lr=1e-3, betas=[0.9, 0.95], weight_decay=0.01)
    file = tmp_path_factory.mktemp("job") / "job.json"
    file.write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, str(HERE / "trl_sft_losses.py"), str(file)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {"recipe": base, "trl": json.loads(done.stdout)}


LAYOUTS = {
    "one": (1, {}),
    "tp2-pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradient_norms(setting: dict[str, Any], layout: str, tmp_path: Path):
    world, parallel = LAYOUTS[layout]
    recipe = {**setting["recipe"], "parallel": parallel, "output": str(tmp_path / "run")}
    assert run_ranks(sft_checks.train, world, recipe) == [""] * world
    ours = sft_checks.curve(tmp_path / "run", "loss", "grad_norm")
    assert len(ours) == STEPS
    for (step, loss, norm), expected, expected_norm in zip(ours, setting["trl"]["loss"], setting["trl"]["grad_norm"], strict=True):
        assert loss == pytest.approx(expected, abs=1e-4), f"step {step}"
        assert norm == pytest.approx(expected_norm, rel=1e-3), f"step {step}"


def test_the_comparison_can_fail(setting: dict[str, Any], tmp_path: Path):
    """A learning rate 10 % higher is seen; so is a loss over the prompt."""
    base = setting["recipe"]
    for name, change in {"optimizer": {"lr": 1.1e-3}, "data": {"loss_on": "all"}}.items():
        recipe = {**base, name: {**base[name], **change}, "output": str(tmp_path / name)}
        assert run_ranks(sft_checks.train, 1, recipe) == [""]
        losses = [loss for _, loss in sft_checks.curve(tmp_path / name, "loss")]
        assert max(abs(a - b) for a, b in zip(losses, setting["trl"]["loss"], strict=True)) > 1e-3

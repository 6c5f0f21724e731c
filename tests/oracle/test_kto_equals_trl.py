"""KTO step by step equals TRL's KTOTrainer: loss, baseline, rewards, log-probs and gradient norm over 8 steps.

The same Hugging Face folder, the shorter rows of kto_en_demo.json as the same token ids, order and AdamW settings; tolerances of the
oracle conventions: absolute 1e-4 for losses, relative 1e-5 for sums of log-probs. A Llama on one rank, TP2, PP2, CP2, DP2 and TP2 x PP2;
a Qwen3-MoE on one rank and EP2.
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
import kto_checks  # noqa: E402
from test_dpo_equals_trl import PP2, TP2, moe_folder  # noqa: E402
from test_sft_equals_trl import llama_folder  # noqa: E402
from trl_kto_steps import NAMES  # noqa: E402

STEPS, BATCH = 8, 4
OPTIMIZER = dict(lr=3e-4, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8, weight_decay=0.01, clip_grad=1.0, lr_decay_style="constant")
WEIGHTS = dict(desirable_weight=1.3, undesirable_weight=0.7)
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one": (1, {}, {}),
    "one-model": (1, {}, {"reference": "model"}),
    "one-apo": (1, {}, {"loss": "apo_zero_unpaired"}),
    "tp2": (2, TP2, {}),
    "pp2": (2, PP2, {}),
    "cp2": (2, {"context_parallel_size": 2}, {}),
    "dp2": (2, {}, {}),
    "tp2-pp2": (4, {**TP2, **PP2}, {}),
    "moe-one": (1, {}, {}),
    "moe-ep2": (2, {"expert_model_parallel_size": 2}, {}),
}


@pytest.fixture(scope="module")
def setting(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The recipe of all runs, what TRL makes of the same answers, and our runs on every layout."""
    from megalign.config.schema import Recipe
    from megalign.data.answers import build_answers

    folder, experts, out = (tmp_path_factory.mktemp(name) for name in ("llama", "qwen3-moe", "runs"))
    everything = json.loads((shared_data / "demo_formats" / "kto_en_demo.json").read_text())
    short = [row for row in everything if sum(len(message["content"]) for message in row["messages"]) < 1800][:40]
    (out / "short.json").write_text(json.dumps(short))
    base = {
        "model": {"init_from": str(folder)},
        "data": dict(
            train=str(out / "short.json"), validation_rows=0, sequence_length=2048, shuffle=False, tokenizer=dict(vocab_size=1024),
        ),
        "optimizer": OPTIMIZER,
        "train": dict(micro_batch_size=1, global_batch_size=BATCH, max_steps=STEPS, sample_prompts=0),
        "kto": WEIGHTS,
        "logging": dict(tensorboard=False, report=False),
    }  # fmt: skip
    train, _ = build_answers(Recipe.model_validate({**base, "model": {}, "output": str(out / "tokenizer")}))
    train.tokenizer.save(folder)
    llama_folder(folder, train.tokenizer.vocab_size)
    train.tokenizer.save(experts)
    moe_folder(experts, train.tokenizer.vocab_size)
    rows = [as_trl(train.rows[i][0]) for i in range(STEPS * BATCH)]
    for start in range(0, len(rows), BATCH):  # TRL does not cut: neither may we
        block = rows[start : start + BATCH]
        assert all(len(row["prompt_ids"]) + len(block[i - 1]["completion_ids"]) + 8 <= 2048 for i, row in enumerate(block))
    job = dict(model=str(folder), rows=rows, batch_size=BATCH, steps=STEPS, lr=OPTIMIZER["lr"], **WEIGHTS)
    file = tmp_path_factory.mktemp("job") / "job.json"
    file.write_text(json.dumps([job, {**job, "loss": "apo_zero_unpaired"}, {**job, "model": str(experts)}]))
    done = subprocess.run([sys.executable, str(HERE / "trl_kto_steps.py"), str(file)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stderr[-2000:]
    kto, apo, moe = json.loads(done.stdout.splitlines()[-1])
    for world in (1, 2, 4):
        recipes = [
            {**base, "output": str(out / name), "parallel": parallel, "kto": {**WEIGHTS, **more}, "model": {"init_from": str(experts if "moe" in name else folder)}}
            for name, (size, parallel, more) in LAYOUTS.items()
            if size == world
        ]
        assert run_ranks(kto_checks.train_all, world, recipes, timeout=400)[0] == [""] * len(recipes)
    return {"recipe": base, "out": out, "kto": kto, "apo": apo, "moe": moe}


def as_trl(example: Any) -> dict[str, Any]:
    """Token ids as TRL has them after tokenisation: a prompt, and an answer up to its end-of-turn token."""
    scored = np.flatnonzero(example.loss_mask)
    assert len(scored) == scored[-1] - scored[0] + 1
    ids = example.input_ids.tolist()
    return {"prompt_ids": ids[: scored[0]], "completion_ids": ids[scored[0] : scored[-1] + 1], "label": bool(example.values["desirable"])}


def compare(ours: list[dict[str, Any]], trl: list[dict[str, float]]) -> tuple[float, Any]:
    """(largest difference in units of its tolerance, where); the two name the same metrics at every step."""
    worst: tuple[float, Any] = (0.0, None)
    for line, expected in zip(ours, trl, strict=True):
        sums = max(abs(expected.get(f"logps/{side}", 0.0)) for side in ("chosen", "rejected"))
        for name in NAMES:
            assert (name in line) == (name in expected) or (name == "kl" and not expected.get("kl")), (line["step"], name)
            if name not in line:
                continue
            allowed = {"grad_norm": 1e-3 * abs(expected[name]), "loss": 1e-4, "kl": 2e-5 * sums + 1e-4}.get(name, 1e-5 * abs(expected[name]))
            if name.startswith("rewards/"):  # beta times a difference of two such sums
                allowed = 0.1 * 2e-5 * sums + 1e-4
            difference = abs(line[name] - expected[name]) / allowed
            worst = max(worst, (difference, (line["step"], name, line[name], expected[name])), key=lambda pair: pair[0])
    return worst


@pytest.mark.parametrize("layout", LAYOUTS)
def test_eight_steps(setting: dict[str, Any], layout: str):
    ours = kto_checks.metrics(setting["out"] / layout)
    assert len(ours) == STEPS
    trl = setting["apo" if layout.endswith("apo") else "moe" if layout.startswith("moe") else "kto"]
    worst, where = compare(ours, trl)
    assert worst <= 1, where
    if not layout.endswith("apo"):
        assert max(line["kl"] for line in trl) > 0.05, "the baseline is not only 0"
    assert max(abs(line["rewards/margins"]) for line in trl if "rewards/margins" in line) > 0.02, "the policy has moved"


def test_the_comparison_can_fail(setting: dict[str, Any], tmp_path: Path):
    """A learning rate 10 % higher, no class weights, another beta, other rows in a batch: each is seen."""
    base = setting["recipe"]
    changes = [
        {"optimizer": {**OPTIMIZER, "lr": 3.3e-4}},
        {"kto": {}},
        {"kto": {**WEIGHTS, "beta": 0.11}},
        {"train": {**base["train"], "global_batch_size": 2, "max_steps": STEPS}},
    ]
    recipes = [{**base, **change, "output": str(tmp_path / str(number))} for number, change in enumerate(changes)]
    assert run_ranks(kto_checks.train_all, 1, recipes)[0] == [""] * len(recipes)
    for number in range(3):
        assert compare(kto_checks.metrics(tmp_path / str(number)), setting["kto"])[0] > 10
    smaller = kto_checks.metrics(tmp_path / "3")
    assert any(abs(line["loss"] - expected["loss"]) > 1e-3 for line, expected in zip(smaller, setting["kto"]))

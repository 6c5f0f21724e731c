"""The first loss of a distillation equals TRL's generalised Jensen-Shannon loss on the logits that transformers gives.

Teacher and student are exported, both run by transformers in FP32 on the same rows, each on its own, and TRL's function of
its GKDTrainer is applied with our scored tokens as labels: shift, mask, temperature and denominator are all TRL's.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

pytestmark = pytest.mark.oracle
sys.path[:0] = [str(Path(__file__).parents[1] / "end_to_end")]
import best_of_n_checks  # noqa: E402
from best_of_n_checks import metrics, recipe, start  # noqa: E402

SETTINGS: dict[str, dict[str, Any]] = {
    "forward": dict(loss="forward_kl", temperature=0.8),
    "reverse": dict(loss="reverse_kl", temperature=1.5),
    "between": dict(loss="jensen_shannon", beta=0.3),
}
TRL_BETA = {"forward": 0.0, "reverse": 1.0, "between": 0.3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("distill-oracle")
    teacher, student = base / "teacher", base / "student"
    small = dict(num_layers=1, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2)
    untaught = start(student, train=dict(micro_batch_size=4, global_batch_size=8, max_steps=6, sample_prompts=0))
    tokens = {**untaught["data"], "tokenizer": {"path": str(teacher / "tokenizer")}}
    jobs = [("sft", start(teacher)), ("sft", {**untaught, "model": small, "data": tokens})]
    for name, settings in SETTINGS.items():
        for layout, parallel in (("one", {}), ("tp2", {"tensor_model_parallel_size": 2})):
            made = recipe(base / f"{name}-{layout}", student, parallel=parallel, data={"shuffle": False}, optimizer={"lr_warmup_steps": 0})
            made["train"] |= {"max_steps": 1, "sample_prompts": 0}
            jobs.append(("distill", {**made, "distill": {"teacher": str(teacher), **settings}}))
    for world in (1, 2):
        here = [job for job in jobs if (2 if job[1].get("parallel") else 1) == world]
        assert run_ranks(best_of_n_checks.work, world, here)[0] == [""] * len(here)
    run_ranks(export, 1, [str(teacher), str(student)])
    return base


def export(runs: list[str]) -> None:
    import os

    from megalign.parallel.grid import destroy_grid
    from megalign.parallel.init import read_world
    from megalign.serving import write_hugging_face

    for run in runs:
        write_hugging_face(Path(run), Path(run + "-hf"), "float32", read_world(os.environ))
        destroy_grid()


@pytest.mark.parametrize("name", SETTINGS)
def test_the_first_loss_is_trls(folder: Path, name: str):
    import torch
    from transformers import AutoModelForCausalLM
    from trl.experimental.gkd import GKDTrainer

    from megalign.config.schema import Recipe
    from megalign.data.dataset import build_datasets
    from megalign.models.resolve import resolve_model

    models = [AutoModelForCausalLM.from_pretrained(folder / f"{which}-hf", dtype=torch.float32) for which in ("student", "teacher")]
    made = resolve_model(Recipe.model_validate({**recipe(folder / f"{name}-one", folder / "student", data={"shuffle": False})}))
    train, _ = build_datasets(made)
    total, count = 0.0, 0
    for pack in (train.rows[number] for number in range(made.train.global_batch_size)):  # without shuffling the first step's
        for example in pack:
            ids = torch.from_numpy(example.input_ids.astype("int64"))[None]
            labels = torch.where(torch.from_numpy(example.loss_mask)[None], ids, -100)[:, 1:]
            with torch.no_grad():
                student, teacher = (model(ids).logits[:, :-1].float() for model in models)
            beta, temperature = TRL_BETA[name], SETTINGS[name].get("temperature", 1.0)
            total += float(GKDTrainer.generalized_jsd_loss(student, teacher, labels=labels, beta=beta, temperature=temperature, reduction="sum"))
            count += int((labels != -100).sum())
    assert total / count > 0.01
    for layout in ("one", "tp2"):
        (line,) = metrics(folder / f"{name}-{layout}")
        assert line["loss"] == pytest.approx(total / count, abs=1e-4), layout

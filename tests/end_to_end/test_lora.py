"""LoRA from recipe to export: exact resumption, checkpoints of adapters, merged weights, a PEFT folder, DPO against the base."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lora_run_checks
import pytest
import sft_checks
import torch
from dpo_checks import recipe as pairs
from ranks import run_ranks
from safetensors.torch import load_file
from sft_checks import MOE_4, curve, metrics, recipe

EXACT = ("loss", "grad_norm", "learning_rate", "num_tokens")
LORA = {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj", "gate_proj", "down_proj"]}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("lora")
    result = run_ranks(lora_run_checks.story, 1, folder, {"moe_aux_loss_coeff": 0.0}, LORA)[0]
    assert result["errors"] == ["", "", ""]
    return folder, result


def test_an_interrupted_run_is_the_uninterrupted_one(tmp_path: Path):
    """S7, bitwise, with dropout, on four ranks and on one in BF16."""
    for name, world, parallel, precision in (("four", 4, MOE_4, "fp32"), ("one", 1, {}, "bf16")):
        options: dict[str, Any] = {"parallel": parallel, "lora": {"rank": 4, "dropout": 0.2}}
        train = {"precision": precision, "max_steps": 6}
        whole, halves = (recipe(tmp_path / f"{name}-{part}", train=train, **options) for part in ("whole", "halves"))
        half = recipe(tmp_path / f"{name}-halves", train={**train, "stop_at_step": 3}, **options)
        results = run_ranks(sft_checks.train_all, world, [whole, half, halves])
        assert results == [["", "", ""]] * world
        expected = curve(tmp_path / f"{name}-whole", *EXACT)
        assert len(expected) == 6 and curve(tmp_path / f"{name}-halves", *EXACT) == expected
        assert [line["eval_loss"] for line in metrics(tmp_path / f"{name}-whole", "eval")] == [line["eval_loss"] for line in metrics(tmp_path / f"{name}-halves", "eval")][-1:]


def test_the_merged_folder_is_the_model_with_adapters(told: tuple[Path, dict[str, Any]]):
    """transformers' logits of the export equal ours with the adapters on."""
    from transformers import AutoModelForCausalLM

    folder, result = told
    loaded = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)
    theirs = loaded(torch.arange(7, 31)[None]).logits[0]
    ours = result["logits"][:, : theirs.shape[-1]]
    assert float((theirs - ours).abs().max()) < 1e-4 * float(ours.abs().max())


def test_the_peft_folder_added_to_the_base_is_the_merged_one(told: tuple[Path, dict[str, Any]]):
    """W + alpha / r B A of the files, by PEFT's names; and nothing else moved."""
    folder, _ = told
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 4 and config["lora_alpha"] == 8 and config["base_model_name_or_path"] == str(folder / "base")
    assert config["target_modules"] == ["q_proj", "v_proj", "w1", "w2"], "as Mixtral calls them"
    base, merged, adapter = (load_file(folder / name) for name in ("base/model.safetensors", "merged/model.safetensors", "adapter/adapter_model.safetensors"))
    paths = {name.removesuffix(".lora_A.weight") for name in adapter if name.endswith(".lora_A.weight")}
    assert len(adapter) == 2 * len(paths) and len(paths) == 2 * (2 + 2 * 4)
    for name, weight in base.items():
        path = f"base_model.model.{name.removesuffix('.weight')}"
        if path in paths:
            a, b = (adapter[f"{path}.lora_{factor}.weight"].double() for factor in "AB")
            assert a.shape == (4, weight.shape[1]) and b.shape == (weight.shape[0], 4)
            assert torch.allclose(merged[name].double(), weight.double() + 2.0 * b @ a, atol=1e-6)
            assert not torch.equal(merged[name], weight), f"{name} was not adapted"
            paths.discard(path)
        else:
            assert torch.equal(merged[name], weight)
    assert not paths


def test_a_checkpoint_names_its_base(told: tuple[Path, dict[str, Any]]):
    folder, result = told
    identity = json.loads((Path(result["checkpoint"]) / "meta.json").read_text())["identity"]
    assert identity["base"]["init_from"] == str((folder / "base").resolve()) and len(identity["base"]["sha256"]) == 64
    told_first = [line["message"] for line in metrics(folder / "run", "event") if line["event"] == "adapters"]
    # r (in + out): q 32 + 32, v 32 + 16, and of 4 experts gate and down 32 + 24; two layers
    assert told_first[0].startswith(f"{2 * 4 * (64 + 48 + 4 * 2 * 56):,} parameters of rank 4 are trained, beside down_proj, gate_proj, q_proj, v_proj")
    refused = result["refused"]
    assert "has other adapters (lora.rank: 4 there, 3 here)" in refused["other rank"]
    assert "has other adapters" in refused["no adapters"]
    assert "adapters of another base" in refused["changed base"]
    assert "adapters of another base" in refused["serve changed base"] and "restore its files" in refused["serve changed base"]
    assert "is not there; name where it is now" in refused["serve absent base"]


def test_a_run_with_adapters_is_a_base(told: tuple[Path, dict[str, Any]]):
    """Adapters on adapters: the second run starts where the first one ended, whose weights it takes merged."""
    folder, result = told
    ended = [line["eval_loss"] for line in metrics(folder / "run", "eval")]
    begins = [line["eval_loss"] for line in metrics(folder / "again", "eval") if line["step"] == 0]
    identity = json.loads(next((folder / "again" / "checkpoints").glob("iter_*/meta.json")).read_text())["identity"]
    assert identity["base"]["init_from"] == str(Path(result["checkpoint"]).resolve())
    first = curve(folder / "again", "loss")[0][1]
    assert first < curve(folder / "run", "loss")[0][1] and (not begins or begins[0] == pytest.approx(ended[-1], rel=1e-5))


def test_dpo_with_the_base_as_reference(tmp_path: Path):
    """Adapters off is a second model that never moves: the same curve as against one in memory; resumed bitwise; no dropout."""
    names = ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
    assert run_ranks(lora_run_checks.preferences, 1, tmp_path)[0] == [""] * 6
    base, model, halves = (curve(tmp_path / name, *names) for name in ("base", "model", "halves"))
    assert base[0][1] == pytest.approx(math.log(2), abs=1e-6) and min(row[1] for row in base) < math.log(2) - 1e-3
    for ours, theirs in zip(base, model, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    assert halves == base
    told = [line["message"] for line in metrics(tmp_path / "base", "event") if line["event"] == "reference"]
    assert told[0].startswith("policy = reference at step 0") and not (tmp_path / "base" / "reference").exists()
    for ours, theirs in zip(*(curve(tmp_path / f"kto-{how}", "loss", "grad_norm", "kl") for how in ("base", "model")), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    four = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}
    here = pairs(tmp_path / "four", parallel=four, lora={"rank": 4, "alpha": 16}, optimizer={"lr": 2e-2}, dpo={"reference": "base"}, train={"stop_at_step": 2})
    assert run_ranks(lora_run_checks.dpo_checks.train_all, 4, [here]) == [[""]] * 4
    for ours, theirs in zip(curve(tmp_path / "four", *names), base):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)

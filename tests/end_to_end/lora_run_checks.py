"""Whole LoRA runs on a base of their own: trained, converted, answered with. What they wrote is read by the test."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import dpo_checks
import kto_checks
import sft_checks
import torch


def story(folder: Path, model: dict[str, Any], lora: dict[str, Any]) -> dict[str, Any]:
    """A base is trained and written as a Hugging Face folder; adapters are trained on it; both exports; logits; what is refused."""
    from megalign.parallel.grid import destroy_grid
    from megalign.parallel.init import read_world
    from megalign.serving import load_for_inference, write_hugging_face

    world, base = read_world(os.environ), folder / "base"
    short = {"max_steps": 3, "eval_interval": None}
    errors = [sft_checks.train(sft_checks.recipe(folder / "first", model=model, train=short))]
    write_hugging_face(folder / "first", base, "float32", world)
    destroy_grid()
    adapted: dict[str, Any] = {"model": {"init_from": str(base)}, "lora": lora, "optimizer": {"lr": 3e-3}, "train": {"max_steps": 6, "keep_last": 9, "save_interval": 3}}
    plain = sft_checks.recipe(folder / "run")
    plain["model"], plain["data"] = {}, {**plain["data"], "tokenizer": {}}

    def tune(output: str, **changes: Any) -> dict[str, Any]:
        made = {**plain, "output": str(folder / output)}
        for section, values in {**adapted, **changes}.items():
            made[section] = {**made.get(section, {}), **values}
        return made

    errors.append(sft_checks.train(tune("run")))
    write_hugging_face(folder / "run", folder / "merged", "float32", world)
    destroy_grid()
    write_hugging_face(folder / "run", folder / "adapter", "float32", world, adapter=True)
    destroy_grid()
    again = tune("again", model={"init_from": str(folder / "run")})
    again["train"], again["optimizer"] = {**again["train"], "max_steps": 2}, {**again["optimizer"], "lr_warmup_steps": 0}
    errors.append(sft_checks.train(again))
    engine, checkpoint = load_for_inference(folder / "run", [], world)
    tokens = torch.arange(7, 31)[None]
    with torch.no_grad():
        engine.models[0].eval()
        logits = engine.models[0](tokens, torch.arange(24)[None], None)[0]
    destroy_grid()

    def refusal(recipe: dict[str, Any]) -> str:
        message = sft_checks.train(recipe)
        destroy_grid()
        return message

    refused = {"other rank": refusal(tune("run", lora={**lora, "rank": 3})), "no adapters": refusal({**tune("run"), "lora": {}})}
    (base / "config.json").write_text((base / "config.json").read_text() + "\n")
    refused["changed base"] = refusal(tune("run", train={**adapted["train"], "max_steps": 8}))
    for name, moved in (("serve changed base", None), ("serve absent base", str(folder / "nowhere"))):
        try:
            load_for_inference(folder / "run", [] if moved is None else [f"model.init_from={moved}"], world)
            refused[name] = ""
        except Exception as error:
            refused[name] = f"{type(error).__name__}: {error}"
    return {"errors": errors, "logits": logits, "checkpoint": str(checkpoint), "refused": refused}


def preferences(folder: Path) -> list[str]:
    """DPO with adapters: the base as reference, a second model, and the first again in two halves; KTO with both references."""
    lora = {"rank": 4, "alpha": 16, "dropout": 0.1}
    half, fast = {"train": {"stop_at_step": 3}}, {"optimizer": {"lr": 2e-2}}
    runs = [
        dpo_checks.recipe(folder / "base", lora=lora, dpo={"reference": "base"}, **fast),
        dpo_checks.recipe(folder / "model", lora=lora, dpo={"reference": "model"}, **fast),
        dpo_checks.recipe(folder / "halves", lora=lora, dpo={"reference": "base"}, **half, **fast),
        dpo_checks.recipe(folder / "halves", lora=lora, dpo={"reference": "base"}, **fast),
    ]
    answers = [kto_checks.recipe(folder / f"kto-{how}", lora=lora, kto={"reference": how}, train={"max_steps": 4}, **fast) for how in ("base", "model")]
    return dpo_checks.train_all(runs) + kto_checks.train_all(answers)

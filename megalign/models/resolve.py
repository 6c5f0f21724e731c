"""The shape of a model that starts from a folder: Hugging Face's (its config.json), or a run or checkpoint of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megalign.config.errors import ConfigError, Problem
from megalign.config.schema import ModelConfig, Recipe
from megalign.models.hf.registry import model_config_from_hf
from megalign.parallel.checkpoint import list_checkpoints, read_meta


def own_checkpoint(path: Path) -> Path | None:
    """A checkpoint folder of ours as it is; of a run folder the best checkpoint, else the last; None for any other folder."""
    if (path / "manifest.json").exists():
        return path
    found = list_checkpoints(path / "checkpoints") or list_checkpoints(path)
    summary = path / "summary.json"
    best = json.loads(summary.read_text()).get("best_checkpoint") if found and summary.exists() else None
    return next((checkpoint for checkpoint in found if checkpoint.name == best), found[-1] if found else None)


def resolve_model(recipe: Recipe) -> Recipe:
    """The recipe with the shape of `model.init_from` in place of its own; a checkpoint of ours gives tokenizer and template too.

    Raises ConfigError for a folder without config.json, ConversionError for a model that is not supported.
    """
    if recipe.model.init_from is None:
        return recipe
    checkpoint = own_checkpoint(Path(recipe.model.init_from))
    if checkpoint is not None:
        return _like_checkpoint(recipe, checkpoint)
    path = Path(recipe.model.init_from) / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        problem = Problem(
            "model.init_from",
            f"{path} cannot be read ({error})",
            "give a local Hugging Face folder with config.json and *.safetensors",
            recipe.model.init_from,
        )
        raise ConfigError([problem]) from None
    return _shaped(recipe, model_config_from_hf(config), path)


# What a recipe may say otherwise than the checkpoint that it starts from: how to train, not what the model is.
_OF_THE_RUN = {
    "preset", "init_from", "attention_dropout", "hidden_dropout", "init_method_std", "mtp_num_layers", "mtp_loss_scaling_factor", "transformer_impl",
    "moe_router_bias_update_rate", "moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_input_jitter_eps", "moe_expert_capacity_factor",
    "moe_token_dispatcher_type", "moe_grouped_gemm",
}  # fmt: skip


def _like_checkpoint(recipe: Recipe, checkpoint: Path) -> Recipe:
    meta = read_meta(checkpoint)
    shape = {key: value for key, value in meta["recipe"]["model"].items() if key not in _OF_THE_RUN}
    resolved = _shaped(recipe, {**shape, "vocab_size": meta["identity"]["vocab_size"]}, checkpoint)
    if resolved.data.tokenizer.path is None:
        resolved.data.tokenizer.path = str(checkpoint / "tokenizer")
        if resolved.data.template == type(recipe.data)().template:
            resolved.data.template = "tokenizer"  # stored beside it: the one that the checkpoint was trained with
    return resolved


def _shaped(recipe: Recipe, shape: dict[str, Any], path: Path) -> Recipe:
    given = recipe.model.model_dump(include=recipe.model.model_fields_set)
    problems = [
        Problem(f"model.{key}", f"{path} says {shape[key]!r}", "leave it out beside model.init_from", value)
        for key, value in given.items()
        if value is not None and key in shape and shape[key] != value
    ]
    if problems:
        raise ConfigError(problems)
    resolved = recipe.model_copy(deep=True)
    resolved.model = ModelConfig.model_validate({**recipe.model.model_dump(), **shape})
    return resolved

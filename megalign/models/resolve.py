"""The shape of a model that starts from a Hugging Face folder; reads config.json alone."""

from __future__ import annotations

import json
from pathlib import Path

from megalign.config.errors import ConfigError, Problem
from megalign.config.schema import ModelConfig, Recipe
from megalign.models.hf.registry import model_config_from_hf


def resolve_model(recipe: Recipe) -> Recipe:
    """The recipe with the shape of `model.init_from`'s config.json in place of its own.

    Raises ConfigError for a folder without config.json, ConversionError for a model that is not supported.
    """
    if recipe.model.init_from is None:
        return recipe
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
    shape = model_config_from_hf(config)
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

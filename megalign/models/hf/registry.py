"""The families, and which one a config.json or a model belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalign.config.schema import ModelConfig
from megalign.models.hf.deepseek_v2 import DEEPSEEK_V2
from megalign.models.hf.deepseek_v3 import DEEPSEEK_V3
from megalign.models.hf.family import Family
from megalign.models.hf.gpt2 import GPT2
from megalign.models.hf.llama import LLAMA
from megalign.models.hf.mixtral import MIXTRAL
from megalign.models.hf.qwen2 import QWEN2
from megalign.models.hf.qwen3 import QWEN3
from megalign.models.hf.qwen3_moe import QWEN3_MOE
from megalign.models.hf.table import ConversionError

FAMILIES = {family.model_type: family for family in (LLAMA, QWEN2, QWEN3, QWEN3_MOE, MIXTRAL, GPT2, DEEPSEEK_V2, DEEPSEEK_V3)}


def family_of_config(config: Mapping[str, Any]) -> Family:
    """The family of a config.json. Raises ConversionError for any other `model_type`."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ConversionError(f"config.json has model_type {model_type!r}; supported: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def family_of_model(model: ModelConfig) -> Family:
    """The family in which `model` is written. Raises ConversionError when none can express it."""
    for family in FAMILIES.values():
        if family.has_traits_of(model):
            family.check_model(model)
            return family
    nearest = min(FAMILIES.values(), key=lambda family: len(family.problems(model)))
    raise ConversionError(f"no family has these traits; the nearest is {nearest.model_type}: " + "; ".join(nearest.problems(model)))


def model_config_from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """`ModelConfig` fields of a config.json of any family; see `Family.model_config_from_hf`."""
    return family_of_config(config).model_config_from_hf(config)


def hf_config_from_model(model: ModelConfig, vocab_size: int, dtype: str, **tokens: Any) -> dict[str, Any]:
    """The config.json of `model`; see `Family.hf_config_from_model`."""
    return family_of_model(model).hf_config_from_model(model, vocab_size, dtype, **tokens)

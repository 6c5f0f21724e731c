"""Rotary frequencies in config.json: plain, scaled as Llama 3.1 does, or by YaRN.

transformers 5 has one dictionary `rope_parameters`, 4.57 `rope_theta` and `rope_scaling`; both are read, both
are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalign.config.schema import ModelConfig
from megalign.models.hf.table import ConversionError

# rope_type there -> here, and config.json key -> field; `factor` and the original length belong to both scaled kinds.
KINDS = {"default": "rope", "llama3": "llama3", "yarn": "yarn"}
SCALED = {"factor": "rotary_scaling_factor", "original_max_position_embeddings": "original_max_position_embeddings"}
OPTIONS = {
    "default": {},
    "llama3": {**SCALED, "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"},
    "yarn": {**SCALED, "beta_fast": "beta_fast", "beta_slow": "beta_slow", "mscale": "mscale", "mscale_all_dim": "mscale_all_dim"},
}
ROTARY_FIELDS = ("rope_type", *dict.fromkeys(name for options in OPTIONS.values() for name in options.values()))
SILENT = {"partial_rotary_factor": 1.0, "attention_factor": None, "truncate": True}  # what else may stand there, with this value


def fields(config: Mapping[str, Any], model_type: str, theta: float | None) -> dict[str, Any]:
    """The rotary fields of `ModelConfig`. theta: base of a config.json that gives none (None: an error).

    Raises ConversionError for a kind of scaling, or an option of one, that the model here does not have.
    """
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = config.get(key) or {}
    base = rope.get("rope_theta", config.get("rope_theta", theta))
    if base is None:
        raise ConversionError(f"config.json has no 'rope_theta', which a {model_type} model needs; add it")
    found = {name: ModelConfig.model_fields[name].default for name in ROTARY_FIELDS} | {"rotary_base": float(base)}
    kind = rope.get("rope_type", rope.get("type", "default"))
    wrong = [f"{name} {rope[name]!r}" for name, value in SILENT.items() if name in rope and rope[name] not in (value, None)]
    if kind not in KINDS or wrong:
        what = ", ".join(wrong) or f"rope_type {kind!r}"
        raise ConversionError(f"config.json ({model_type}) has {key} {dict(rope)!r}: {what} is not supported; only {', '.join(KINDS)} without it")
    found["rope_type"] = KINDS[kind]
    if kind == "default":
        return found
    if rope.get("factor") is None:
        raise ConversionError(f"config.json ({model_type}) has {key} {dict(rope)!r}: it needs 'factor'")
    if kind == "yarn" and bool(rope.get("mscale")) != bool(rope.get("mscale_all_dim")):
        rule = "transformers ignores mscale without mscale_all_dim, and the other way round; give both or neither"
        raise ConversionError(f"config.json ({model_type}) has {key} {dict(rope)!r}: {rule}")
    for name, field in OPTIONS[kind].items():
        if rope.get(name):
            found[field] = rope[name]
    found["original_max_position_embeddings"] = found["original_max_position_embeddings"] or config["max_position_embeddings"]
    return found


def keys(model: ModelConfig) -> dict[str, Any]:
    """The rotary keys of config.json, in both spellings."""
    kind = next(theirs for theirs, ours in KINDS.items() if ours == model.rope_type)
    options = {name: getattr(model, field) for name, field in OPTIONS[kind].items()}
    if kind == "yarn" and not (model.mscale and model.mscale_all_dim):
        if (model.mscale, model.mscale_all_dim) != (1.0, 0.0):
            rule = "transformers ignores one without the other; set both, or 1 and 0"
            raise ConversionError(f"model.mscale is {model.mscale:g} and model.mscale_all_dim {model.mscale_all_dim:g}: {rule}")
        del options["mscale"], options["mscale_all_dim"]
    named = {"rope_type": kind, **options}
    return {
        "rope_theta": model.rotary_base,
        "rope_scaling": {**named, "type": kind} if options else None,
        "rope_parameters": {**named, "rope_theta": model.rotary_base},
    }

"""What a family is: its weight table and the translation of config.json to and from `ModelConfig`.

config.json decides the shape and the arithmetic of a model. What belongs to a training run (dropout, jitter,
auxiliary-loss coefficients) stays the recipe's and is not read; on export it is written where a key exists.
A feature that the model here lacks is refused by name: weights that load while the arithmetic differs are
the worst kind of success.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megalign.config.schema import ModelConfig
from megalign.models.hf.conversion import Conversion
from megalign.models.hf.table import ConversionError, Dimensions, Row

# config.json key -> ModelConfig field, in both directions, of every family.
COMMON_FIELDS = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "layernorm_epsilon",
    "tie_word_embeddings": "share_embeddings_and_output_weights",
    "initializer_range": "init_method_std",
}
# What absent keys mean to transformers. None: `ModelConfig` has the same default.
COMMON_DEFAULTS = {"num_key_value_heads": None, "head_dim": None, "tie_word_embeddings": False, "initializer_range": 0.02}
# Two spellings of one key: transformers 5 and 4.57 each read their own, so both are written.
ALSO_SPELLED = {"num_local_experts": "num_experts", "dtype": "torch_dtype"}
ABSENT = object()


@dataclass(frozen=True)
class Family:
    """A row of families. `fixed`: the only value of a config.json key whose feature is supported."""

    model_type: str
    architecture: str
    rows: tuple[Row, ...]
    qk_layernorm: bool
    fixed: Mapping[str, Any]
    fields: Mapping[str, str]
    defaults: Mapping[str, Any]
    moe: bool = False
    fused: Mapping[str, tuple[str, str]] | None = None  # see fused.py

    def conversion(self, dims: Dimensions) -> Conversion:
        return Conversion(self.rows, dims)

    def model_config_from_hf(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """`ModelConfig` fields of a config.json.

        Raises ConversionError for a missing key and for an unsupported feature (quantised weights, biases,
        sliding windows, rope scaling, layers that are not all alike, ...), with key and value.
        """
        self._refuse_unsupported(config)
        fields = {field: self._read(config, key) for key, field in self.fields.items()}
        fields["rotary_base"] = self._rotary_base(config)
        fields["qk_layernorm"] = self.qk_layernorm
        fields |= {"moe_shared_expert_intermediate_size": None}
        if self.moe:
            fields = {"ffn_hidden_size": fields["moe_ffn_hidden_size"], "moe_norm_topk_prob": True} | fields
        else:
            fields["num_moe_experts"] = None
        return fields

    def hf_config_from_model(
        self,
        model: ModelConfig,
        vocab_size: int,
        dtype: str,
        *,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
    ) -> dict[str, Any]:
        """The config.json of `model`, in the spellings of transformers 4.57 and 5 at once.

        `vocab_size` counts the rows written, without padding; `dtype` is torch's name ("bfloat16"). Raises
        ConversionError when the family cannot express the model (a shared expert, unnormalised Mixtral gates).
        """
        self.check_model(model)
        width = model.moe_ffn_hidden_size or model.ffn_hidden_size
        head_size = model.kv_channels or model.hidden_size // model.num_attention_heads
        resolved = model.model_dump() | {
            "vocab_size": vocab_size,
            "num_query_groups": model.num_query_groups or model.num_attention_heads,
            "kv_channels": head_size,
            "moe_ffn_hidden_size": width,
        }
        config = {"architectures": [self.architecture], "model_type": self.model_type, "dtype": dtype}
        config |= {key: resolved[field] for key, field in self.fields.items()}
        config |= dict(self.fixed) | {"attention_dropout": model.attention_dropout, "use_cache": True}
        config |= {"rope_theta": model.rotary_base, "rope_scaling": None}
        config |= {"rope_parameters": {"rope_type": "default", "rope_theta": model.rotary_base}}
        config |= {"bos_token_id": None, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
        if self.moe:
            config |= {"router_aux_loss_coef": model.moe_aux_loss_coeff, "output_router_logits": False}
        return config | {other: config[key] for key, other in ALSO_SPELLED.items() if key in config}

    def check_model(self, model: ModelConfig) -> None:
        """Raises ConversionError when a field of `model` has no counterpart in this family."""
        problems = []
        if model.qk_layernorm != self.qk_layernorm:
            problems.append(f"model.qk_layernorm is {model.qk_layernorm}, which it needs to be {self.qk_layernorm}")
        if bool(model.num_moe_experts) != self.moe:
            problems.append(f"model.num_moe_experts is {model.num_moe_experts}")
        if model.moe_shared_expert_intermediate_size is not None:
            problems.append(
                f"model.moe_shared_expert_intermediate_size is {model.moe_shared_expert_intermediate_size}, "
                "and the format has no shared expert"
            )
        if self.moe and "norm_topk_prob" not in self.fields and not model.moe_norm_topk_prob:
            problems.append("model.moe_norm_topk_prob is False, and the format always rescales the chosen probabilities")
        if problems:
            raise ConversionError(f"the model cannot be written as {self.architecture}: " + "; ".join(problems))

    def _refuse_unsupported(self, config: Mapping[str, Any]) -> None:
        for key, supported in {"quantization_config": None, "partial_rotary_factor": 1.0, **self.fixed}.items():
            value = config.get(key)
            if value is not None and value != supported:
                raise self._unsupported(key, value, f"only {supported!r} is supported")
        if windowed := [kind for kind in config.get("layer_types") or () if kind != "full_attention"]:
            raise self._unsupported("layer_types", windowed, "only 'full_attention' is supported")

    def _rotary_base(self, config: Mapping[str, Any]) -> float:
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
            key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
            raise self._unsupported(key, dict(rope), "only plain rotary positions are supported (no rope scaling)")
        return float(rope["rope_theta"] if "rope_theta" in rope else self._read(config, "rope_theta"))

    def _read(self, config: Mapping[str, Any], key: str) -> Any:
        other = ALSO_SPELLED.get(key, key)
        value = config.get(key, config.get(other, self.defaults.get(key, ABSENT)))
        if value is ABSENT:
            raise ConversionError(f"config.json has no {key!r}, which a {self.model_type} model needs; add it")
        if config.get(other, value) != value:
            raise ConversionError(f"config.json has {key} {value} and {other} {config[other]}: they must be equal")
        if value is None and self.defaults.get(key, ABSENT) is not None:
            raise ConversionError(f"config.json has {key!r} null, which a {self.model_type} model needs; give it")
        return value

    def _unsupported(self, key: str, value: Any, rule: str) -> ConversionError:
        return ConversionError(f"config.json ({self.model_type}) has {key} {value!r}: {rule}")

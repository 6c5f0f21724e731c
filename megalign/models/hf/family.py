"""What a family is: its weight table and the translation of config.json to and from `ModelConfig`.

config.json decides the shape and the arithmetic of a model. What belongs to a training run (dropout, jitter,
auxiliary-loss coefficients) stays the recipe's and is not read; on export it is written where a key exists.
A feature that the model here lacks is refused by name: weights that load while the arithmetic differs are
the worst kind of success.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megalign.config.layout import layers_with_experts
from megalign.config.schema import ModelConfig
from megalign.models.hf import rope
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
# Fields that a config.json does not spell out: the family has them. Those of most families, Llama's.
TRAITS: dict[str, Any] = {
    "normalization": "RMSNorm",
    "activation_func": "silu",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "position_embedding_type": "rope",
    "qk_layernorm": False,
    "multi_latent_attention": False,
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
}
_ROUTING = ("moe_router_num_groups", "moe_router_group_topk", "moe_router_topk_scaling_factor")


@dataclass(frozen=True)
class Family:
    """A row of families. `fixed`: the only value of a config.json key whose feature is supported.

    traits: where it differs from `TRAITS`. prefix: what files saved without a head leave out of every name.
    """

    model_type: str
    architecture: str
    rows: tuple[Row, ...]
    fixed: Mapping[str, Any]
    fields: Mapping[str, str]
    defaults: Mapping[str, Any]
    traits: Mapping[str, Any] = field(default_factory=dict)
    moe: bool = False
    fused: Mapping[str, tuple[str, str]] | None = None  # see fused.py
    prefix: str = ""
    mtp_copies: Mapping[str, str] | None = None  # see Conversion; None: the format has no prediction modules

    def conversion(self, dims: Dimensions) -> Conversion:
        return Conversion(self.rows, dims, self.mtp_copies)

    def model_config_from_hf(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """`ModelConfig` fields of a config.json.

        Raises ConversionError for a missing key and for an unsupported feature (quantised weights, biases,
        sliding windows, dynamic rope scaling, layers that are not all alike, ...), with key and value.
        """
        self._refuse_unsupported(config)
        fields = {field: self._read(config, key) for key, field in self.fields.items()}
        absent = {"moe_shared_expert_intermediate_size": None, "moe_layer_freq": 1, **dict.fromkeys(_ROUTING)}
        fields = absent | fields | TRAITS | dict(self.traits) | self.rope_fields(config)
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
        config |= self.rope_keys(model)
        config |= {"bos_token_id": None, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
        if self.moe:
            config |= {"router_aux_loss_coef": model.moe_aux_loss_coeff, "output_router_logits": False}
        return config | {other: config[key] for key, other in ALSO_SPELLED.items() if key in config}

    def check_model(self, model: ModelConfig) -> None:
        """Raises ConversionError when a field of `model` has no counterpart in this family."""
        if problems := self.problems(model):
            raise ConversionError(f"the model cannot be written as {self.architecture}: " + "; ".join(problems))

    def has_traits_of(self, model: ModelConfig) -> bool:
        """Whether `model` is of this kind; `check_model` says whether it can be written."""
        traits = {**TRAITS, **self.traits}
        return bool(model.num_moe_experts) == self.moe and all(getattr(model, name) == value for name, value in traits.items())

    def problems(self, model: ModelConfig) -> list[str]:
        """What of `model` the format cannot say."""
        traits = {**TRAITS, **self.traits}
        wrong = [f"model.{name} is {getattr(model, name)}, which it needs to be {value}" for name, value in traits.items() if getattr(model, name) != value]
        if bool(model.num_moe_experts) != self.moe:
            wrong.append(f"model.num_moe_experts is {model.num_moe_experts}")
        if model.mtp_num_layers and self.mtp_copies is None:
            wrong.append(f"model.mtp_num_layers is {model.mtp_num_layers}, and the format has no prediction modules")
        if not self.moe:
            return wrong
        if not all(layers_with_experts(model)):
            wrong += self.problems_of_dense_layers(model)
        if model.moe_shared_expert_intermediate_size is not None:
            wrong += self.problems_of_shared_expert(model)
        for name in set(_ROUTING) - set(self.fields.values()):
            if getattr(model, name) is not None:
                wrong.append(f"model.{name} is {getattr(model, name)}, and the format has no such routing")
        if not {"norm_topk_prob"} & (set(self.fields) | set(self.fixed)) and not model.moe_norm_topk_prob:
            wrong.append("model.moe_norm_topk_prob is False, and the format always rescales the chosen probabilities")
        return wrong

    def problems_of_dense_layers(self, model: ModelConfig) -> list[str]:
        return [f"model.moe_layer_freq is {model.moe_layer_freq}, and the format has experts in every layer"]

    def problems_of_shared_expert(self, model: ModelConfig) -> list[str]:
        width = model.moe_shared_expert_intermediate_size
        return [f"model.moe_shared_expert_intermediate_size is {width}, and the format has no shared expert"]

    def rope_fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The rotary fields of `ModelConfig` of a config.json."""
        theta = self.defaults.get("rope_theta", ABSENT)
        return rope.fields(config, self.model_type, None if theta is ABSENT else theta)

    def rope_keys(self, model: ModelConfig) -> dict[str, Any]:
        """The rotary keys of config.json of a model."""
        return rope.keys(model)

    def _refuse_unsupported(self, config: Mapping[str, Any]) -> None:
        for key, supported in {"quantization_config": None, "partial_rotary_factor": 1.0, **self.fixed}.items():
            value = config.get(key)
            if value is not None and value != supported:
                raise self._unsupported(key, value, f"only {supported!r} is supported")
        if windowed := [kind for kind in config.get("layer_types") or () if kind != "full_attention"]:
            raise self._unsupported("layer_types", windowed, "only 'full_attention' is supported")

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

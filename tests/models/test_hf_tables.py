"""The weight tables: bitwise round trips, layouts against plain loops, cuts over ranks, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megalign.config.schema import ModelConfig
from megalign.models.hf.registry import (
    FAMILIES,
    family_of_config,
    family_of_model,
    hf_config_from_model,
    model_config_from_hf,
)
from megalign.models.hf.shards import Place, full_from_locals, global_name, local_from_full
from megalign.models.hf.table import ConversionError, Dimensions

# Sizes that are all different, so that a swapped dimension cannot pass. 8 heads in 4 groups of size 6.
SHAPE = {"num_layers": 2, "hidden_size": 40, "ffn_hidden_size": 56, "num_attention_heads": 8, "num_query_groups": 4, "kv_channels": 6}
EXPERTS = {"num_moe_experts": 4, "moe_ffn_hidden_size": 24, "moe_router_topk": 2}
VOCAB, PADDED = 51, 64
MODELS = {
    name: ModelConfig.model_validate(fields)
    for name, fields in {
        "llama": SHAPE,
        "llama_tied": SHAPE | {"share_embeddings_and_output_weights": True},
        "qwen2": SHAPE | {"add_qkv_bias": True},
        "qwen3": SHAPE | {"qk_layernorm": True},
        "qwen3_moe": SHAPE | EXPERTS | {"qk_layernorm": True, "moe_norm_topk_prob": False},
        "mixtral": SHAPE | EXPERTS,
    }.items()
}
GROUPED = EXPERTS | {"moe_router_num_groups": 2, "moe_router_group_topk": 1, "moe_router_topk_scaling_factor": 2.5}
LATENT = {key: value for key, value in SHAPE.items() if key not in ("num_query_groups", "kv_channels")} | GROUPED | {
    "multi_latent_attention": True,
    "q_lora_rank": 20,
    "layernorm_epsilon": 1e-6,
    "moe_layer_freq": [0, 1],
    "moe_shared_expert_intermediate_size": 48,
}
SIGMOID = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
GPT2 = {"normalization": "LayerNorm", "activation_func": "gelu_tanh", "gated_linear_unit": False, "add_bias_linear": True}
# Models whose weights are not Llama's; test_hf_io.py reads and writes transformers' own files of them.
OTHERS = {
    name: ModelConfig.model_validate(fields)
    for name, fields in {
        "gpt2": GPT2 | {"position_embedding_type": "learned_absolute", "hidden_size": 40, "num_attention_heads": 4, "num_layers": 2}
        | {"share_embeddings_and_output_weights": True},
        "deepseek_v2": LATENT | {"moe_norm_topk_prob": False},
        "deepseek_v3": LATENT | SIGMOID | {"rope_type": "yarn", "rotary_scaling_factor": 40.0, "original_max_position_embeddings": 4096}
        | {"mscale_all_dim": 1.0},
    }.items()
}  # fmt: skip
every_model = pytest.mark.parametrize("name", MODELS)


def conversion_of(name: str, padded: int | None = None):
    model = MODELS[name]
    return family_of_model(model).conversion(Dimensions.of(model, VOCAB, padded))


def random_weights(name: str, seed: int = 0) -> dict[str, Tensor]:
    """Hugging Face weights of the model `name`, shapes written down here a second time."""
    model, generator = MODELS[name], torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (51, 40), "model.norm.weight": (40,)}
    if not model.share_embeddings_and_output_weights:
        shapes["lm_head.weight"] = (51, 40)
    for layer in ("model.layers.0.", "model.layers.1."):
        shapes |= {layer + "input_layernorm.weight": (40,), layer + "post_attention_layernorm.weight": (40,)}
        shapes |= {layer + "self_attn.q_proj.weight": (48, 40), layer + "self_attn.o_proj.weight": (40, 48)}
        shapes |= {layer + "self_attn.k_proj.weight": (24, 40), layer + "self_attn.v_proj.weight": (24, 40)}
        if model.add_qkv_bias:
            shapes |= {layer + f"self_attn.{part}_proj.bias": (rows,) for part, rows in (("q", 48), ("k", 24), ("v", 24))}
        if model.qk_layernorm:
            shapes |= {layer + "self_attn.q_norm.weight": (6,), layer + "self_attn.k_norm.weight": (6,)}
        if not model.num_moe_experts:
            shapes |= {layer + f"mlp.{part}_proj.weight": (56, 40) for part in ("gate", "up")}
            shapes |= {layer + "mlp.down_proj.weight": (40, 56)}
            continue
        moe, gate, up, down = ("mlp", "gate_proj", "up_proj", "down_proj") if model.qk_layernorm else ("block_sparse_moe", "w1", "w3", "w2")
        shapes |= {layer + f"{moe}.gate.weight": (4, 40)}
        for expert in range(4):
            shapes |= {layer + f"{moe}.experts.{expert}.{part}.weight": (24, 40) for part in (gate, up)}
            shapes |= {layer + f"{moe}.experts.{expert}.{down}.weight": (40, 24)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@every_model
@pytest.mark.parametrize("padded", [VOCAB, PADDED])
def test_round_trip_is_bitwise_both_ways(name: str, padded: int) -> None:
    conversion, weights = conversion_of(name, padded), random_weights(name)
    megatron = dict(conversion.from_hf(weights))
    assert_same(dict(conversion.to_hf(megatron.items())), weights)
    assert_same(dict(conversion.from_hf(dict(conversion.to_hf(megatron.items())))), megatron)
    assert megatron["embedding.word_embeddings.weight"].shape == (padded, 40)
    assert not megatron["embedding.word_embeddings.weight"][VOCAB:].any()
    assert ("output_layer.weight" in megatron) == (name != "llama_tied")


@every_model
def test_layout_against_a_plain_loop(name: str) -> None:
    """Head by head: group g holds its 2 query heads, then its key head, then its value head; gate lies above up."""
    weights = random_weights(name)
    megatron = dict(conversion_of(name).from_hf(weights))
    q, k, v = (weights[f"model.layers.1.self_attn.{part}_proj.weight"].split(6) for part in "qkv")
    expected = [head for group in range(4) for head in (q[2 * group], q[2 * group + 1], k[group], v[group])]
    assert torch.equal(megatron["decoder.layers.1.self_attention.linear_qkv.weight"], torch.cat(expected))
    gate_up = {
        "qwen3_moe": ("mlp.experts.local_experts.3.linear_fc1.weight", "mlp.experts.3.gate_proj.weight", "mlp.experts.3.up_proj.weight"),
        "mixtral": ("mlp.experts.local_experts.3.linear_fc1.weight", "block_sparse_moe.experts.3.w1.weight", "block_sparse_moe.experts.3.w3.weight"),
    }.get(name, ("mlp.linear_fc1.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight"))
    fc1 = megatron["decoder.layers.1." + gate_up[0]]
    half = fc1.shape[0] // 2
    assert torch.equal(fc1[:half], weights["model.layers.1." + gate_up[1]])
    assert torch.equal(fc1[half:], weights["model.layers.1." + gate_up[2]])


@settings(max_examples=30, deadline=None)
@given(groups=st.integers(1, 6), per_group=st.integers(1, 4), head=st.integers(1, 5), hidden=st.integers(1, 4))
def test_qkv_of_any_grouping_round_trips(groups: int, per_group: int, head: int, hidden: int) -> None:
    model = ModelConfig.model_validate(
        {"hidden_size": hidden, "num_attention_heads": groups * per_group, "num_query_groups": groups, "kv_channels": head}
    )
    dims = Dimensions.of(model, 8)
    row, _ = FAMILIES["llama"].conversion(dims).entries["decoder.layers.0.self_attention.linear_qkv.weight"]
    parts = [torch.randn(shape) for shape in row.part_shapes(dims)]
    assert [part.shape[0] for part in parts] == [groups * per_group * head, groups * head, groups * head]
    assert all(torch.equal(a, b) for a, b in zip(row.split(row.merge(parts, dims), dims), parts))


@every_model
@pytest.mark.parametrize("size", [1, 2, 4])
def test_cut_and_join_over_ranks(name: str, size: int) -> None:
    for weight_name, full in conversion_of(name, PADDED).from_hf(random_weights(name)):
        places = [Place(rank, size, rank, size) for rank in range(size)]
        locals_ = [local_from_full(weight_name, full, place) for place in places]
        assert torch.equal(full_from_locals(weight_name, locals_), full)
        replicated = "layernorm" in weight_name or "router" in weight_name
        assert locals_[0].numel() * (1 if replicated else size) == full.numel()


def test_each_kind_of_cut_has_the_rows_that_megatron_computes_with() -> None:
    place = Place(tensor_rank=1, tensor_size=2, expert_tensor_rank=0, expert_tensor_size=4)
    full = torch.arange(16.0).repeat(8, 1).t().contiguous()  # [16, 8], the value is the row

    def rows(name: str) -> list[float]:
        return local_from_full("decoder.layers.0." + name, full, place)[:, 0].tolist()

    assert rows("self_attention.linear_qkv.weight") == list(range(8, 16))
    assert rows("mlp.linear_fc1.weight") == [4, 5, 6, 7, 12, 13, 14, 15]  # gate 0-7, up 8-15
    assert rows("mlp.shared_experts.linear_fc1.weight") == [4, 5, 6, 7, 12, 13, 14, 15]
    assert rows("mlp.experts.local_experts.5.linear_fc1.weight") == [0, 1, 8, 9]  # first of four expert-tensor ranks
    assert rows("mlp.router.weight") == list(range(16))
    columns = local_from_full("decoder.layers.0.mlp.linear_fc2.weight", full.t().contiguous(), place)
    assert columns.shape == (8, 8) and columns[0].tolist() == list(range(8, 16))
    assert columns.is_contiguous()


def test_global_names() -> None:
    assert global_name("decoder.layers.1.mlp.experts.local_experts.2.linear_fc1.weight", 4, 8) == (
        "decoder.layers.5.mlp.experts.local_experts.10.linear_fc1.weight"
    )
    assert global_name("module.module.decoder.layers.11.input_layernorm.weight", 12) == "decoder.layers.23.input_layernorm.weight"
    assert global_name("embedding.word_embeddings.weight", 4, 8) == "embedding.word_embeddings.weight"
    # Transformer Engine's spellings
    assert global_name("decoder.layers.0.self_attention.linear_qkv.layer_norm_weight", 2) == "decoder.layers.2.input_layernorm.weight"
    assert global_name("decoder.layers.0.mlp.linear_fc1.layer_norm_weight", 2) == "decoder.layers.2.pre_mlp_layernorm.weight"
    assert global_name("decoder.layers.0.mlp.experts.linear_fc2.weight3", 2, 4) == (
        "decoder.layers.2.mlp.experts.local_experts.7.linear_fc2.weight"
    )


def test_a_rank_gets_its_part_from_global_numbers() -> None:
    """The second of two stages, second of two tensor ranks, second of two expert ranks; experts are not cut."""
    weights, conversion = random_weights("mixtral"), conversion_of("mixtral", 52)
    place = Place(tensor_rank=1, tensor_size=2, layer_offset=1, expert_offset=2)

    def part(local_name: str) -> Tensor:
        name = global_name(local_name, place.layer_offset, place.expert_offset)
        return local_from_full(name, conversion.load(name, weights), place)

    assert torch.equal(
        part("decoder.layers.0.self_attention.linear_proj.weight"), weights["model.layers.1.self_attn.o_proj.weight"][:, 24:]
    )
    assert torch.equal(
        part("decoder.layers.0.mlp.experts.local_experts.1.linear_fc2.weight"),
        weights["model.layers.1.block_sparse_moe.experts.3.w2.weight"],
    )
    output = part("output_layer.weight")
    assert torch.equal(output[:25], weights["lm_head.weight"][26:]) and not output[25].any()


def test_the_last_stage_of_a_tied_model_gets_the_embedding_as_output_layer() -> None:
    conversion, weights = conversion_of("llama_tied"), random_weights("llama_tied")
    assert torch.equal(conversion.load("output_layer.weight", weights), weights["model.embed_tokens.weight"])
    stream = [*conversion.from_hf(weights), ("output_layer.weight", weights["model.embed_tokens.weight"])]
    assert_same(dict(conversion.to_hf(stream)), weights)


def test_nothing_is_left_out_silently() -> None:
    conversion, weights = conversion_of("mixtral"), random_weights("mixtral")
    lacking = {name: w for name, w in weights.items() if name != "model.layers.1.block_sparse_moe.experts.2.w3.weight"}
    with pytest.raises(ConversionError, match=r"1 missing \(model.layers.1.block_sparse_moe.experts.2.w3.weight\), 0 unknown"):
        list(conversion.from_hf(lacking))
    with pytest.raises(ConversionError, match=r"0 missing, 1 unknown \(model.layers.0.self_attn.q_proj.bias\)"):
        list(conversion.from_hf(weights | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(48)}))
    with pytest.raises(ConversionError, match=r"q_proj.weight has shape \(40, 48\).* says \(48, 40\)"):
        list(conversion.from_hf(weights | {"model.layers.0.self_attn.q_proj.weight": torch.zeros(40, 48)}))
    megatron = dict(conversion.from_hf(weights))
    with pytest.raises(ConversionError, match="incomplete: 1 missing .decoder.layers.0.mlp.router.weight"):
        dict(conversion.to_hf((n, w) for n, w in megatron.items() if n != "decoder.layers.0.mlp.router.weight"))
    with pytest.raises(ConversionError, match="output_layer.weight came twice"):
        dict(conversion.to_hf([*megatron.items(), ("output_layer.weight", megatron["output_layer.weight"])]))
    with pytest.raises(ConversionError, match="no row for 'value_head.weight'"):
        dict(conversion.to_hf([("value_head.weight", torch.zeros(1, 40))]))
    with pytest.raises(ConversionError, match=r"linear_proj.weight has shape \(40, 24\)"):  # a shard, not gathered
        dict(conversion.to_hf([("decoder.layers.0.self_attention.linear_proj.weight", torch.zeros(40, 24))]))
    with pytest.raises(ConversionError, match="no rule says how 'value_head.weight' is cut"):
        local_from_full("value_head.weight", torch.zeros(1, 40), Place())
    with pytest.raises(ConversionError, match="51 rows are no multiple of tensor_model_parallel_size = 2"):
        local_from_full("output_layer.weight", torch.zeros(51, 40), Place(tensor_size=2))
    with pytest.raises(ConversionError, match="6 rows are no multiple of tensor_model_parallel_size = 4"):  # 6 gate, 6 up
        local_from_full("decoder.layers.0.mlp.linear_fc1.weight", torch.zeros(12, 40), Place(tensor_size=4))
    with pytest.raises(ConversionError, match="24 columns are no multiple of expert_tensor_parallel_size = 5"):
        local_from_full("decoder.layers.0.mlp.experts.local_experts.0.linear_fc2.weight", torch.zeros(40, 24), Place(expert_tensor_size=5))


def test_derived_names_are_accepted_only_when_they_say_the_same() -> None:
    conversion, weights = conversion_of("llama_tied"), random_weights("llama_tied")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(3)
    conversion.check(weights)
    weights["lm_head.weight"][0, 0] += 1
    with pytest.raises(ConversionError, match="tie_word_embeddings true, yet lm_head.weight differs"):
        conversion.check(weights)


SCALINGS = [
    {},
    {"rope_type": "llama3", "rotary_scaling_factor": 8.0, "original_max_position_embeddings": 8192, "low_freq_factor": 2.0},
    {"rope_type": "yarn", "rotary_scaling_factor": 4.0, "original_max_position_embeddings": 32768, "beta_fast": 16.0},
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=["plain", "llama3", "yarn"])
def test_scaled_frequencies_round_trip_in_both_spellings(scaling: dict) -> None:
    model = MODELS["llama"].model_copy(update={"rotary_base": 5e5, **scaling})
    config = hf_config_from_model(model, VOCAB, "float32")
    for spelling in (config, {key: value for key, value in config.items() if key != "rope_parameters"}):
        fields = model_config_from_hf(spelling)
        assert {key: value for key, value in fields.items() if getattr(model, key) != value} == {"vocab_size": VOCAB}
    assert (config["rope_scaling"] is None) == (not scaling)


@pytest.mark.parametrize("name", OTHERS)
def test_config_round_trip_of_the_others(name: str) -> None:
    model = OTHERS[name].model_copy(update={"vocab_size": VOCAB})
    assert family_of_model(model).model_type == name
    fields = model_config_from_hf(hf_config_from_model(model, VOCAB, "float32"))
    assert {key: value for key, value in fields.items() if getattr(model, key) != value} == {}


def test_gpt2_against_a_plain_loop() -> None:
    """Head by head, its query, key and value; each weight there is [in, out]."""
    dims = Dimensions.of(OTHERS["gpt2"], VOCAB)
    entries = FAMILIES["gpt2"].conversion(dims).entries
    for kind, shape in (("weight", (40, 120)), ("bias", (120,))):
        whole = torch.randn(shape)
        row, _ = entries[f"decoder.layers.1.self_attention.linear_qkv.{kind}"]
        q, k, v = (part.split(10) for part in whole.t().split(40))
        merged = row.merge([whole], dims)
        assert torch.equal(merged, torch.cat([part[head] for head in range(4) for part in (q, k, v)]))
        assert torch.equal(row.split(merged, dims)[0], whole)
    fc1, _ = entries["decoder.layers.1.mlp.linear_fc1.weight"]
    assert fc1.whole_shape(dims) == (384, 40)
    # without a gate a tensor rank has one run of rows
    place = Place(tensor_rank=1, tensor_size=2, gated=False)
    rows = torch.arange(8.0)[:, None]
    assert local_from_full("decoder.layers.0.mlp.linear_fc1.weight", rows, place).flatten().tolist() == [4, 5, 6, 7]
    assert torch.equal(full_from_locals("decoder.layers.0.mlp.linear_fc1.weight", list(rows.chunk(2)), gated=False), rows)


def test_a_model_has_only_the_weights_of_its_kind() -> None:
    names = set(FAMILIES["deepseek_v3"].conversion(Dimensions.of(OTHERS["deepseek_v3"], VOCAB)).hf_names)
    assert "model.layers.0.mlp.gate_proj.weight" in names and "model.layers.1.mlp.gate_proj.weight" not in names
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in names and "model.layers.0.mlp.gate.weight" not in names
    direct = OTHERS["deepseek_v3"].model_copy(update={"q_lora_rank": None, "moe_shared_expert_intermediate_size": None})
    other = set(FAMILIES["deepseek_v3"].conversion(Dimensions.of(direct, VOCAB)).hf_names)
    assert {name.partition(".layers.1.")[2] for name in names ^ other if ".layers.1." in name} == {
        *(f"self_attn.{part}.weight" for part in ("q_proj", "q_a_proj", "q_a_layernorm", "q_b_proj")),
        *(f"mlp.shared_experts.{part}_proj.weight" for part in ("gate", "up", "down")),
    }


@every_model
def test_config_round_trip(name: str) -> None:
    model = MODELS[name].model_copy(update={"rotary_base": 5e5, "layernorm_epsilon": 1e-6, "vocab_size": VOCAB})
    config = hf_config_from_model(model, VOCAB, "bfloat16", eos_token_id=[3, 4])
    fields = model_config_from_hf(config)
    differing = {field for field, value in fields.items() if getattr(model, field) != value}
    assert differing == ({"ffn_hidden_size"} if name == "mixtral" else set())  # unused there: every layer has experts
    assert fields["rotary_base"] == config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e5
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["eos_token_id"] == [3, 4]
    assert model_config_from_hf({key: value for key, value in config.items() if key != "rope_parameters"}) == fields  # 4.57's keys


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"attention_bias": True}, "attention_bias True"),
        ("llama", {"mlp_bias": True}, "mlp_bias True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu': only 'silu'"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters .*yarn.*needs 'factor'"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}}, "mscale without mscale_all_dim"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.5}}, "attention_factor 1.5 is not supported"),
        ("llama", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling .*linear"),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window True"),
        ("gpt2", {"activation_function": "relu"}, "activation_function 'relu': only 'gelu_new'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob True"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc'"),
        ("deepseek_v2", {"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-05: only 1e-06, that of the latents' norms"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave False"),
        ("deepseek_v3", {"norm_topk_prob": False}, "norm_topk_prob False"),
        ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config .*fp8"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config .*fp8"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window True"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types .*sliding_attention"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers \[0\]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step 2"),
        ("qwen3_moe", {"num_experts": 8}, "num_local_experts 4 and num_experts 8"),
        ("mixtral", {"sliding_window": 4096}, "sliding_window 4096"),
        ("mixtral", {"hidden_size": None}, "'hidden_size' null"),
        ("llama", {"model_type": "opt"}, "model_type 'opt'; supported: llama, qwen2, qwen3, qwen3_moe, mixtral, gpt2, deepseek_v2, deepseek_v3"),
    ],
)
def test_what_the_model_lacks_is_refused_by_name(name: str, change: dict, message: str) -> None:
    config = hf_config_from_model((MODELS | OTHERS)[name], VOCAB, "float32")
    model_config_from_hf(config)
    with pytest.raises(ConversionError, match=message):
        model_config_from_hf(config | change)


def test_absent_keys() -> None:
    config = hf_config_from_model(MODELS["llama"], VOCAB, "float32")
    old = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_parameters", "num_key_value_heads", "head_dim")}
    fields = model_config_from_hf(old)  # Llama 1's config.json
    assert (fields["rotary_base"], fields["num_query_groups"], fields["kv_channels"]) == (10000.0, None, None)
    del old["rms_norm_eps"]
    with pytest.raises(ConversionError, match="no 'rms_norm_eps', which a llama model needs"):
        model_config_from_hf(old)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moe_shared_expert_intermediate_size": 16}, "moe_shared_expert_intermediate_size is 16"),
        ({"moe_norm_topk_prob": False}, "MixtralForCausalLM: model.moe_norm_topk_prob is False"),
        ({"moe_layer_freq": [0, 1]}, r"moe_layer_freq is \[0, 1\], and the format has experts in every layer"),
        ({"moe_router_topk_scaling_factor": 2.0}, "moe_router_topk_scaling_factor is 2.0"),
        ({"moe_router_score_function": "sigmoid"}, "no family has these traits; the nearest is mixtral: .*moe_router_score_function is sigmoid"),
    ],
)
def test_models_that_no_family_can_express_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        family_of_model(MODELS["mixtral"].model_copy(update=change))


def test_families_are_found() -> None:
    assert [family_of_model(model).model_type for model in MODELS.values()] == ["llama", "llama", "qwen2", "qwen3", "qwen3_moe", "mixtral"]
    assert family_of_config({"model_type": "qwen3_moe"}) is FAMILIES["qwen3_moe"]
    with pytest.raises(ConversionError, match="padded_vocab_size is 8"):
        Dimensions.of(MODELS["llama"], 10, 8)

"""Hugging Face folders against transformers itself: what it saves is read, what is written it loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as transformers_typed
from safetensors.torch import load_file, save_file
from torch import Tensor

from megalign.config.schema import ModelConfig
from megalign.models.hf.conversion import Conversion
from megalign.models.hf.io import read_hf, write_hf
from megalign.models.hf.registry import family_of_config, hf_config_from_model, model_config_from_hf
from megalign.models.hf.table import ConversionError, Dimensions

transformers: Any = transformers_typed  # its own annotations do not cover what its classes accept
VOCAB, PADDED = 51, 64
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 3,
    "initializer_range": 0.3,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LATENT: dict[str, Any] = COMMON | {
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "moe_intermediate_size": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
CONFIGS = {
    "llama": transformers.LlamaConfig(**COMMON, intermediate_size=48),
    "llama_tied": transformers.LlamaConfig(**COMMON, intermediate_size=48, tie_word_embeddings=True, rope_theta=5e5),
    "llama_head_dim": transformers.LlamaConfig(**COMMON | {"num_key_value_heads": 4}, intermediate_size=48, head_dim=16),
    "qwen3": transformers.Qwen3Config(**COMMON, intermediate_size=48, head_dim=16),
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **COMMON, intermediate_size=48, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, head_dim=16
    ),
    "mixtral": transformers.MixtralConfig(**COMMON, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2),
    "llama3.1": transformers.LlamaConfig(
        **COMMON,
        intermediate_size=48,
        rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 8}
        | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ),
    "qwen2": transformers.Qwen2Config(**COMMON, intermediate_size=48, rope_parameters=YARN),
    "gpt2": transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3, bos_token_id=None, eos_token_id=3
    ),
    "deepseek_v2": transformers.DeepseekV2Config(**LATENT, topk_method="group_limited_greedy", n_group=4, topk_group=2, num_experts_per_tok=3),
    "deepseek_v2_lite": transformers.DeepseekV2Config(**LATENT | {"q_lora_rank": None}, num_experts_per_tok=2),
    "deepseek_v3": transformers.DeepseekV3Config(
        **LATENT, n_group=4, topk_group=2, num_experts_per_tok=3, rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}
    ),
}
every_model = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """A random model of each family (norms too) and the folder that transformers saved it in."""
    models = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(7)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.uniform_(0.5, 1.5)
            for key, buffer in model.named_buffers():
                if key.endswith("e_score_correction_bias"):
                    buffer.uniform_(-0.2, 0.2)
        folder = tmp_path_factory.mktemp(name) / "saved"
        model.save_pretrained(folder)
        models[name] = (model, folder)
    return models


def conversion_for(config: dict[str, Any], padded: int = PADDED) -> tuple[ModelConfig, Conversion]:
    model = ModelConfig.model_validate(model_config_from_hf(config))
    return model, family_of_config(config).conversion(Dimensions.of(model, VOCAB, padded))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(20)[None] % VOCAB).logits


@every_model
def test_transformers_folder_to_megatron_and_back_is_bitwise(name: str, saved: dict) -> None:
    _, folder = saved[name]
    weights = read_hf(folder)
    _, conversion = conversion_for(weights.config)
    back = dict(conversion.to_hf(conversion.from_hf(weights)))
    on_disk = load_file(folder / "model.safetensors")
    assert back.keys() == on_disk.keys()
    assert all(torch.equal(back[key], on_disk[key]) for key in on_disk)


@every_model
def test_written_folder_gives_bitwise_equal_logits_in_transformers(name: str, saved: dict, tmp_path: Path) -> None:
    model, folder = saved[name]
    weights = read_hf(folder)
    config, conversion = conversion_for(weights.config)
    # write from ModelConfig alone, in several shards
    written = hf_config_from_model(config, VOCAB, "float32", eos_token_id=[3, 5])
    write_hf(tmp_path / "out", conversion.to_hf(conversion.from_hf(weights)), written, torch.float32, max_shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert [info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")] == [set(), set(), set()]
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.generation_config.eos_token_id == [3, 5]
    assert dict(read_hf(tmp_path / "out")).keys() == dict(weights).keys()


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v2", "deepseek_v3"])
def test_both_layouts_of_experts_on_disk_are_read(name: str, saved: dict, tmp_path: Path) -> None:
    model, folder = saved[name]
    model.save_pretrained(tmp_path, save_original_format=False)
    assert any(key.endswith("experts.gate_up_proj") for key in load_file(tmp_path / "model.safetensors"))
    fused, single = read_hf(tmp_path), read_hf(folder)
    assert set(fused) == set(single)
    assert all(torch.equal(fused[key], single[key]) for key in single)


def test_gpt2_of_the_hub_names_no_transformer_and_holds_its_masks(saved: dict, tmp_path: Path) -> None:
    _, folder = saved["gpt2"]
    weights = load_file(folder / "model.safetensors")
    bare = {key.removeprefix("transformer."): weight for key, weight in weights.items()} | {"h.0.attn.bias": torch.ones(1, 1, 64, 64)}
    save_file(bare, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    read = read_hf(tmp_path)
    _, conversion = conversion_for(read.config)
    back = dict(conversion.to_hf(conversion.from_hf(read)))
    assert back.keys() == weights.keys() and all(torch.equal(back[key], weights[key]) for key in weights)


def test_prediction_modules_of_deepseek_v3_are_left_out(saved: dict) -> None:
    """The hub's files hold them as layer 61; transformers ignores them too. A layer too many elsewhere is an error."""
    for name, family in (("deepseek_v3", True), ("deepseek_v2", False)):
        weights = dict(read_hf(saved[name][1]))
        _, conversion = conversion_for(read_hf(saved[name][1]).config)
        weights["model.layers.2.eh_proj.weight"] = torch.ones(32, 64)
        if family:
            conversion.check(weights)
        else:
            with pytest.raises(ConversionError, match="1 unknown .model.layers.2.eh_proj.weight"):
                conversion.check(weights)


def test_expert_biases_stay_fp32_in_bf16_files(saved: dict, tmp_path: Path) -> None:
    weights = read_hf(saved["deepseek_v3"][1])
    write_hf(tmp_path / "out", weights.items(), {"dtype": "bfloat16"}, torch.bfloat16)
    written = load_file(tmp_path / "out" / "model.safetensors")
    kept = {name for name, tensor in written.items() if tensor.dtype == torch.float32}
    assert kept == {"model.layers.1.mlp.gate.e_score_correction_bias"}
    assert all(torch.equal(written[name], weights[name]) for name in kept)


def test_several_shards_are_read_as_one(saved: dict, tmp_path: Path) -> None:
    model, folder = saved["llama"]
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    several, single = read_hf(tmp_path), read_hf(folder)
    assert set(several) == set(single)
    assert all(torch.equal(several[key], single[key]) for key in single)


def written_folder(path: Path) -> Path:
    config = {"model_type": "llama", "dtype": "float32"}
    write_hf(path, [("a", torch.ones(100)), ("b", torch.ones(100)), ("c", torch.ones(50))], config, torch.float32, max_shard_bytes=400)
    return path


def test_index_and_files_must_agree(tmp_path: Path) -> None:
    folder = written_folder(tmp_path / "m")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 1000
    assert index["weight_map"] == {k: f"model-0000{i}-of-00003.safetensors" for i, k in enumerate("abc", start=1)}
    assert sorted(read_hf(folder)) == ["a", "b", "c"]

    save_file({"z": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(ConversionError, match=r"missing files \[\], files outside the index \['model.safetensors'\]"):
        read_hf(folder)
    (folder / "model.safetensors").unlink()
    third = folder / "model-00003-of-00003.safetensors"
    save_file({"c": torch.ones(50), "stray": torch.ones(1)}, third)
    with pytest.raises(ConversionError, match="not listed .'stray in model-00003"):
        read_hf(folder)
    save_file({"d": torch.ones(50)}, third)
    with pytest.raises(ConversionError, match=r"absent \['c'\], not listed \['d in"):
        read_hf(folder)
    third.rename(folder / "model-00004-of-00003.safetensors")
    with pytest.raises(ConversionError, match=r"missing files \['model-00003.*outside the index \['model-00004"):
        read_hf(folder)


def test_a_folder_without_safetensors_is_refused_with_its_content(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="config.json does not exist"):
        read_hf(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_text("")
    with pytest.raises(ConversionError, match="neither model.safetensors nor .*pytorch_model.bin"):
        read_hf(tmp_path)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def breaks():
        yield "a", torch.ones(100)
        yield "b", torch.ones(100)
        raise ConversionError("the model is incomplete")

    with pytest.raises(ConversionError, match="incomplete"):
        write_hf(tmp_path / "m", breaks(), {"dtype": "float32"}, torch.float32, max_shard_bytes=10)
    assert list(tmp_path.iterdir()) == []


def test_writes_are_refused_with_a_reason(tmp_path: Path) -> None:
    one = [("a", torch.ones(2))]
    with pytest.raises(ConversionError, match="config's dtype is 'float32', but .* 'bfloat16'"):
        write_hf(tmp_path / "m", one, {"dtype": "float32"}, torch.bfloat16)
    with pytest.raises(ConversionError, match="a came twice"):
        write_hf(tmp_path / "m", one * 2, {"dtype": "float32"}, torch.float32)
    with pytest.raises(ConversionError, match="empty"):
        write_hf(tmp_path / "m", [], {"dtype": "float32"}, torch.float32)
    with pytest.raises(ConversionError, match="neither tokenizer.json nor"):
        write_hf(tmp_path / "m", one, {"dtype": "float32"}, torch.float32, tokenizer=tmp_path)
    folder = written_folder(tmp_path / "m")
    with pytest.raises(ConversionError, match="not an empty folder"):
        write_hf(folder, one, {"dtype": "float32"}, torch.float32)
    assert sorted(read_hf(folder)) == ["a", "b", "c"]


def test_tensors_are_cast_and_copied_and_so_is_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for file in ("tokenizer.json", "chat_template.jinja", "model.safetensors"):
        (tokenizer / file).write_text(file)

    def reuses_its_buffer():  # as a gathering stream may
        buffer = torch.empty(3, dtype=torch.bfloat16)
        for value, name in enumerate("ab"):
            yield name, buffer.fill_(value)
        yield "c", torch.tensor([1.0, 1.001])

    (tmp_path / "m").mkdir()  # empty: allowed
    write_hf(tmp_path / "m", reuses_its_buffer(), {"dtype": "bfloat16", "eos_token_id": 9}, torch.bfloat16, tokenizer=tokenizer)
    written = load_file(tmp_path / "m" / "model.safetensors")
    assert written["a"].tolist() == [0, 0, 0] and written["b"].tolist() == [1, 1, 1]
    assert written["c"].dtype == torch.bfloat16 and written["c"].tolist() == [1, 1]
    assert (tmp_path / "m" / "chat_template.jinja").read_text() == "chat_template.jinja"
    assert json.loads((tmp_path / "m" / "generation_config.json").read_text()) == {"eos_token_id": 9}
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip

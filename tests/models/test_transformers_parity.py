"""Megatron's models against transformers' on the same weights: logits, log-probabilities, every gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file

from megalign.config.schema import ModelConfig

VOCAB = 51  # no multiple of 64: the tables have padding rows, which must not take part in the softmax
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "intermediate_size": 80,
    "initializer_range": 0.1,
    "eos_token_id": None,
    "bos_token_id": None,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
YARN = {"rope_type": "yarn", "rope_theta": 50.0, "factor": 4.0, "original_max_position_embeddings": 16}
LATENT = {key: value for key, value in SHAPE.items() if key != "num_key_value_heads"} | {
    "q_lora_rank": 24, "kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 2,
    "first_k_dense_replace": 1, "routed_scaling_factor": 1.5, "num_key_value_heads": 8,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SHAPE | {"rope_theta": 5e5}),
    "llama_tied": ("LlamaConfig", SHAPE | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", SHAPE | {"head_dim": 16}),
    "qwen3_moe": ("Qwen3MoeConfig", SHAPE | EXPERTS | {"head_dim": 16, "moe_intermediate_size": 32}),
    "qwen3_moe_normalised": ("Qwen3MoeConfig", SHAPE | EXPERTS | {"head_dim": 16, "moe_intermediate_size": 32, "norm_topk_prob": True}),
    "mixtral": ("MixtralConfig", SHAPE | EXPERTS),
    "qwen2": ("Qwen2Config", SHAPE | {"rope_theta": 1e6}),
    # Frequencies of a context of 8 that is stretched: within these documents each kind of scaling acts.
    "llama3.1": (
        "LlamaConfig",
        SHAPE
        | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 50.0, "factor": 4.0, "original_max_position_embeddings": 16}
           | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    ),
    "qwen2_yarn": (
        "Qwen2Config",
        SHAPE | {"rope_parameters": YARN},
    ),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": VOCAB, "n_embd": 48, "n_layer": 4, "n_head": 4, "n_positions": 64, "n_inner": 80, "initializer_range": 0.1}
        | {"eos_token_id": None, "bos_token_id": None},
    ),
    "deepseek_v2": ("DeepseekV2Config", LATENT | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}),
    "deepseek_v2_lite": ("DeepseekV2Config", LATENT | {"q_lora_rank": None, "first_k_dense_replace": 0, "n_shared_experts": 1}),
    "deepseek_v3": (
        "DeepseekV3Config",
        LATENT
        | {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "num_experts_per_tok": 3, "norm_topk_prob": True, "num_mtp_layers": 0}
        | {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 1.0}},
    ),
}  # fmt: skip
DOCUMENTS = (13, 5, 20)


def random_model(name: str) -> Any:
    """transformers' model with random weights, those of the norms too."""
    import transformers

    torch.manual_seed(11)
    config_class, fields = MODELS[name]
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**fields), attn_implementation="eager")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.uniform_(-0.5, 0.5) if key.endswith("bias") else parameter.uniform_(0.5, 1.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.uniform_(-0.2, 0.2)  # enough to change choices
    return model.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each model as transformers saves it."""
    root = tmp_path_factory.mktemp("hf")
    folders = {name: root / name for name in MODELS}
    for name, folder in folders.items():
        random_model(name).save_pretrained(folder)
    return folders


def has_experts(name: str) -> bool:
    return any(key in MODELS[name][1] for key in ("num_local_experts", "n_routed_experts"))


def transformers_step(name: str, documents: list[torch.Tensor], gradient_folder: Path, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [T, V], log-probabilities of each document's next tokens [N], and the gradients of their sum, saved
    by transformers as if they were weights."""
    model = random_model(name).to(dtype)
    logits = [model(document[None]).logits[0] for document in documents]
    logprobs = [row[:-1].log_softmax(-1).gather(-1, tokens[1:, None])[:, 0] for row, tokens in zip(logits, documents)]
    torch.cat(logprobs).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    model.save_pretrained(gradient_folder)
    return torch.cat(logits).detach(), torch.cat(logprobs).detach()


def gradient_of(parameter: Any) -> torch.Tensor:
    return parameter.grad


def differences(names: list[str], folder: Path) -> dict[str, dict[str, float]]:
    """For each model: the largest difference of logits, of log-probabilities and of gradients (relative to the largest of
    the parameter) from transformers in FP32, and of a dense model from transformers in float64."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megalign.models.build import build_chunks
    from megalign.models.hf.io import read_hf
    from megalign.models.hf.registry import family_of_config, model_config_from_hf
    from megalign.models.hf.table import Dimensions
    from megalign.models.weights import load_full, stream_full
    from megalign.parallel.context import packed_sequences
    from megalign.parallel.grid import create_grid

    grid = create_grid()
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    numbers = torch.Generator().manual_seed(5)
    documents = [torch.randint(0, VOCAB, (length,), generator=numbers) for length in DOCUMENTS]
    tokens = torch.cat(documents)[None]
    positions = torch.cat([torch.arange(length) for length in DOCUMENTS])[None]
    labels = torch.cat([document.roll(-1) for document in documents])[None]
    scored = torch.cat([torch.arange(length) < length - 1 for length in DOCUMENTS])[None]
    ends = torch.tensor([0, *torch.tensor(DOCUMENTS).cumsum(0).tolist()], dtype=torch.int32)
    found = {}
    for name in names:
        weights = read_hf(folder / name)
        model = ModelConfig.model_validate(model_config_from_hf(weights.config))
        chunks: Any = build_chunks(model, grid, VOCAB)
        padded = chunks[0].vocab_size
        conversion = family_of_config(weights.config).conversion(Dimensions.of(model, VOCAB, padded))
        conversion.check(weights)
        load_full(chunks, grid, lambda name, *_, source=weights, table=conversion: table.load(name, source))
        packed = packed_sequences(ends, max(DOCUMENTS))
        logits = chunks[0](tokens, positions, None, packed_seq_params=packed)[0, :, :VOCAB]
        logprobs = chunks[0](tokens, positions, None, labels=labels, loss_mask=scored, packed_seq_params=packed)[0]
        logprobs.sum().backward()
        without = [(key, torch.zeros(model.num_moe_experts or 0)) for key in conversion.megatron_names if key.endswith("expert_bias")]
        named = conversion.to_hf([*stream_full(chunks, grid, value=gradient_of), *without])
        gradients = {key: value for key, value in named if not key.endswith("e_score_correction_bias")}  # it has none
        found[name] = {}
        for dtype, suffix in ((torch.float32, ""), (torch.float64, " in float64"))[: 1 if has_experts(name) else 2]:
            gradient_folder = folder / f"{name}_{dtype}"
            expected_logits, expected_logprobs = transformers_step(name, documents, gradient_folder, dtype)
            of_all = dict(read_hf(gradient_folder).items())
            assert gradients.keys() == {key for key in of_all if "correction_bias" not in key}
            largest = {key: of_all[key].abs().max() for key in gradients}
            zero = [key for key in gradients if largest[key] <= 1e-3]
            assert not zero, f"a gradient that is zero proves nothing: {zero}"
            found[name] |= {
                f"logits{suffix}": (logits - expected_logits).abs().max().item(),
                f"logprobs{suffix}": (logprobs - expected_logprobs).abs().max().item(),
                f"gradients{suffix}": max((gradients[key] - of_all[key]).abs().max() / largest[key] for key in gradients).item(),
            }
    return found


def test_logits_logprobs_and_gradients_equal_transformers(folders: dict[str, Path]) -> None:
    """1e-5, in FP32 and, for dense models, once more against float64, where no rounding is left but ours. (transformers'
    experts mix FP32 into float64 and raise: models with experts are compared in FP32.)"""
    (found,) = run_ranks(differences, 1, list(MODELS), next(iter(folders.values())).parent)
    assert all(("gradients in float64" in of_model) is not has_experts(name) for name, of_model in found.items())
    too_far = {name: of_model for name, of_model in found.items() if any(value > 1e-5 for value in of_model.values())}
    assert too_far == {}


LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "tp2 pp2": ("llama_tied", {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "pp2 vpp2 dp2": ("qwen3", {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "tp2 pp2 ep2": ("mixtral", {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}),
    "tp2 ep2 etp2": ("qwen3_moe", {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2}),
    "learned tp2 pp2": ("gpt2", {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "latent tp2 pp2 ep2": ("deepseek_v3", {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}),
    "biased tp2": ("qwen2", {"tensor_model_parallel_size": 2}),
}


def load_and_stream(layouts: dict[str, tuple[str, dict[str, Any]]], root: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Load a Hugging Face folder on every layout and stream it back; rank 0 has the Hugging Face weights."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megalign.models.build import build_chunks
    from megalign.models.hf.io import read_hf
    from megalign.models.hf.registry import family_of_config, model_config_from_hf
    from megalign.models.hf.table import Dimensions
    from megalign.models.weights import load_full, stream_full
    from megalign.parallel.grid import create_grid, destroy_grid

    streamed = {}
    for layout, (name, sizes) in layouts.items():
        grid = create_grid(**sizes)
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        weights = read_hf(root / name)
        model = ModelConfig.model_validate(model_config_from_hf(weights.config))
        chunks: Any = build_chunks(model, grid, VOCAB, sequence_parallel=grid.tensor.size > 1)
        conversion = family_of_config(weights.config).conversion(Dimensions.of(model, VOCAB, chunks[0].vocab_size))
        load_full(chunks, grid, lambda name, *_, source=weights, table=conversion: table.load(name, source))
        full = stream_full(chunks, grid)
        streamed[layout] = {key: value.clone() for key, value in conversion.to_hf(full)} if grid.rank == 0 else dict(full)
        destroy_grid()
    return streamed


def test_every_layout_loads_and_streams_a_folder_bitwise(folders: dict[str, Path]) -> None:
    root = next(iter(folders.values())).parent
    streamed = run_ranks(load_and_stream, 4, LAYOUTS, root)[0]
    for layout, (name, _) in LAYOUTS.items():
        expected = load_file(root / name / "model.safetensors")
        assert streamed[layout].keys() == expected.keys(), layout
        assert [key for key in expected if not torch.equal(streamed[layout][key], expected[key])] == [], layout

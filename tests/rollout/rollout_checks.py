"""What the ranks of the rollout tests run: cached generation on a layout, and the oracle it must equal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from megalign.config.schema import ModelConfig
from megalign.parallel.schedule import from_last_stage
from megalign.rollout.decoder import Decoder
from megalign.rollout.generate import _pad_left, generate
from megalign.rollout.sampler import SamplingParams
from megalign.rollout.switch import generating

VOCAB = 120  # padded to 128 or 256
STEPS = 6
PROMPTS = [[5, 17, 99, 3, 42, 8, 61], [7], [23, 2, 110], [64, 64, 1, 0, 90]]
# Wide enough initial weights that the logits differ by several units.
DENSE = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "max_position_embeddings": 32,
    "init_method_std": 0.2,
}
MOE = {
    **DENSE,
    "qk_layernorm": True,
    "num_moe_experts": 4,
    "moe_ffn_hidden_size": 48,
    "moe_shared_expert_intermediate_size": 32,
}
# DeepSeek-V3: the cache holds the keys and values of all heads, made from the latents.
LATENT = {key: value for key, value in DENSE.items() if key != "num_query_groups"} | {
    "multi_latent_attention": True, "q_lora_rank": 24, "kv_lora_rank": 20, "qk_head_dim": 12, "qk_pos_emb_head_dim": 8, "v_head_dim": 10,
    "rope_type": "yarn", "rotary_scaling_factor": 4.0, "original_max_position_embeddings": 8, "mscale_all_dim": 1.0,
    "num_moe_experts": 4, "moe_ffn_hidden_size": 48, "moe_shared_expert_intermediate_size": 32, "moe_layer_freq": [0, 1, 1, 1],
    "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True, "moe_router_topk_scaling_factor": 2.5,
}  # fmt: skip
LEARNED = {key: value for key, value in DENSE.items() if key != "num_query_groups"} | {  # GPT-2
    "normalization": "LayerNorm", "activation_func": "gelu_tanh", "gated_linear_unit": False, "add_bias_linear": True,
    "position_embedding_type": "learned_absolute", "share_embeddings_and_output_weights": True,
}  # fmt: skip
SCALED = {"rotary_base": 100.0, "rotary_scaling_factor": 4.0, "original_max_position_embeddings": 8}
MODELS: dict[str, dict[str, Any]] = {
    "latent": LATENT,
    "learned": LEARNED,
    "llama3": {**DENSE, **SCALED, "rope_type": "llama3"},
    "yarn": {**DENSE, **SCALED, "rope_type": "yarn", "add_qkv_bias": True},
    "dense": DENSE,
    "tied": {**DENSE, "share_embeddings_and_output_weights": True},
    "moe": MOE,
    "allgather": {**MOE, "moe_token_dispatcher_type": "allgather"},
    "long": {**DENSE, "max_position_embeddings": 256},  # for the chat
    # A capacity that drops most tokens, and noise: neither belongs to generation.
    "dropping": {**MOE, "moe_expert_capacity_factor": 0.25, "moe_input_jitter_eps": 0.3},
}
GREEDY = SamplingParams(temperature=0)
DRAWN = SamplingParams(temperature=0.8, top_k=50, top_p=0.95, repetition_penalty=1.3)
NEVER_TWICE = SamplingParams(temperature=0, repetition_penalty=1e9)
OPTIONS: dict[str, Any] = {"max_new_tokens": STEPS, "stop_ids": (), "vocab_size": VOCAB}


@contextlib.contextmanager
def built(model: str, layout: dict[str, Any], vocab: int = VOCAB) -> Iterator[tuple[Any, Any]]:
    """(chunks, grid) of a model on a layout."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megalign.models.build import build_chunks
    from megalign.models.weights import initialise
    from megalign.parallel.grid import create_grid, destroy_grid

    sizes = dict(layout)
    sequence_parallel = sizes.pop("sequence_parallel", False)
    grid = create_grid(**sizes)
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    config = ModelConfig(**MODELS[model])
    chunks = build_chunks(config, grid, vocab, sequence_parallel=sequence_parallel)
    initialise(chunks, config, grid, seed=3)
    yield chunks, grid
    destroy_grid()


def recomputed(model: str) -> dict[str, Any]:
    """One rank, no cache, no padding: each prompt alone, the whole sequence again for every greedy token.

    logits [rows, steps, V] and tokens [rows][steps].
    """
    logits, tokens = [], []
    with built(model, {}) as ((chunk,), _), torch.no_grad():
        chunk.eval()
        for prompt in PROMPTS:
            ids, rows = list(prompt), []
            for _ in range(STEPS):
                rows.append(chunk(torch.tensor([ids]), torch.arange(len(ids))[None], None)[0, -1, :VOCAB])
                ids.append(int(rows[-1].argmax()))
            logits.append(torch.stack(rows))
            tokens.append(ids[len(prompt) :])
    return {"logits": torch.stack(logits), "tokens": tokens}


def cached(model: str, layout: dict[str, Any], forced: list[list[int]]) -> dict[str, Any]:
    """On this layout: logits of every step after the `forced` tokens, and what `generate` answers."""
    with built(model, layout) as (chunks, grid):
        before = settings(chunks)
        found = {
            "logits": decoded(chunks, grid, forced),
            "greedy": generate(chunks, grid, PROMPTS, sampling=GREEDY, **OPTIONS),
            "drawn": generate(chunks, grid, PROMPTS, sampling=DRAWN, seed=11, **OPTIONS),
            "one prompt": generate(chunks, grid, PROMPTS[2:3], sampling=GREEDY, **OPTIONS),
        }
        left_over = differences(before, settings(chunks))
        with contextlib.suppress(ArithmeticError):
            generate(chunks, grid, PROMPTS, sampling=GREEDY, on_token=fail, **OPTIONS)
        left_over += differences(before, settings(chunks))
    return {**found, "left over": left_over}


def fail(row: int, token: int) -> None:
    raise ArithmeticError


def decoded(chunks: Any, grid: Any, forced: list[list[int]]) -> torch.Tensor:
    """Logits [rows, steps, V] on every rank."""
    tokens_BS, first_B = _pad_left(PROMPTS, max(map(len, PROMPTS)))
    steps, inputs = [], tokens_BS
    with generating(chunks):
        decoder = Decoder(chunks, grid, first_B, tokens_BS.shape[1] + STEPS)
        for step in range(STEPS):
            logits = decoder.step(inputs)
            here = torch.empty(len(PROMPTS), chunks[0].vocab_size) if logits is None else logits.contiguous()
            steps.append(from_last_stage(here, grid)[:, :VOCAB].clone())
            inputs = torch.tensor([row[step] for row in forced])[:, None]
    return torch.stack(steps, dim=1)


def settings(chunks: Any) -> dict[str, Any]:
    """Every flag and number of the modules and their configurations, and the context-parallel groups."""
    found: dict[str, Any] = {}
    for i, chunk in enumerate(chunks):
        for name, module in chunk.named_modules():
            config = vars(module.config) if hasattr(module, "config") else {}
            for key, value in [*vars(module).items(), *config.items()]:
                if key in ("context_group", "cp_group"):
                    found[f"{i}.{name}.{key}"] = id(value)
                elif isinstance(value, (bool, int, float, str, type(None))):
                    found[f"{i}.{name}.{key}"] = value
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    keys = before.keys() | after.keys()
    return [key for key in keys if before.get(key, "absent") != after.get(key, "absent")]


def like(model: str) -> str:
    """The model whose oracle holds: dispatchers, capacity and noise change nothing here."""
    return "moe" if model in ("allgather", "dropping") else model


def on_one_rank(models: list[str], cells: list[str]) -> dict[str, Any]:
    """The oracle of each of `models`, the cache on `cells`, and the rules of `generate`, in one launch."""
    oracle = {model: recomputed(model) for model in models}
    found = {model: cached(model, {}, oracle[like(model)]["tokens"]) for model in cells}
    return {"oracle": oracle, "cached": found, "rules": rules()}


def on_many_ranks(cells: list[tuple[str, dict[str, Any], list[list[int]]]]) -> list[dict[str, Any]]:
    """Several layouts in one launch; in the end, weights that break the logits."""
    return [*(cached(*cell) for cell in cells), {"broken": broken_weights()}]


def broken_weights() -> str:
    """What each rank raises when the last stage alone sees NaN."""
    with built("dense", {"pipeline_model_parallel_size": 2}) as (chunks, grid), torch.no_grad():
        if chunks[-1].post_process:
            chunks[-1].output_layer.weight[3] = float("nan")
        return raised(chunks, grid, PROMPTS, sampling=GREEDY, **OPTIONS)


def rules() -> dict[str, Any]:
    """How rows end, what `on_token` hears, and what is refused."""
    with built("dense", {}) as (chunks, grid):
        greedy = generate(chunks, grid, PROMPTS, sampling=GREEDY, **OPTIONS)
        heard: list[tuple[int, int]] = []

        def hear(row: int, token: int) -> bool:
            heard.append((row, token))
            return len(heard) >= 2 * len(PROMPTS)

        stops = {**OPTIONS, "stop_ids": {greedy[0][2]}}
        found: dict[str, Any] = {
            "greedy": greedy,
            "stopped": generate(chunks, grid, PROMPTS, sampling=GREEDY, **stops),
            "voted": generate(chunks, grid, PROMPTS, sampling=GREEDY, on_token=hear, **OPTIONS),
            "heard": heard,
            "full": generate(chunks, grid, [[1] * 29, [1]], sampling=GREEDY, **OPTIONS),
            "penalised": generate(chunks, grid, PROMPTS, sampling=NEVER_TWICE, **OPTIONS),
            "none": generate(chunks, grid, [], sampling=GREEDY, **OPTIONS),
            "draws": generate(
                chunks,
                grid,
                [PROMPTS[2]] * 4000,
                sampling=SamplingParams(),
                **{**OPTIONS, "max_new_tokens": 1},
            ),
        }
        refused: list[tuple[list[list[int]], dict[str, Any]]] = [
            ([[1], []], OPTIONS),
            ([[1] * 32], OPTIONS),
            ([[1, VOCAB]], OPTIONS),
            ([[1]], {**OPTIONS, "max_new_tokens": 0}),
        ]
        found["refused"] = [
            raised(chunks, grid, prompts, sampling=GREEDY, **more) for prompts, more in refused
        ]
    return found


def raised(*args: Any, **kwargs: Any) -> str:
    try:
        generate(*args, **kwargs)
    except (ValueError, ArithmeticError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"

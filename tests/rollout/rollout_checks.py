"""What the ranks of the rollout tests run: cached generation on a layout, and the oracle it must equal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megalign.config.schema import ModelConfig
from megalign.rollout.sampler import SamplingParams

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
MODELS: dict[str, dict[str, Any]] = {
    "dense": DENSE,
    "tied": {**DENSE, "share_embeddings_and_output_weights": True},
    "moe": MOE,
    "allgather": {**MOE, "moe_token_dispatcher_type": "allgather"},
    # A capacity that drops most tokens, and noise: neither belongs to generation.
    "dropping": {**MOE, "moe_expert_capacity_factor": 0.25, "moe_input_jitter_eps": 0.3},
}
SAMPLED = SamplingParams(temperature=0.8, top_k=50, top_p=0.95, repetition_penalty=1.3)


@contextmanager
def built(model: str, layout: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
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
    chunks = build_chunks(config, grid, VOCAB, sequence_parallel=sequence_parallel)
    initialise(chunks, config, grid, seed=3)
    yield chunks, grid
    destroy_grid()


def recomputed(model: str) -> dict[str, Any]:
    """One rank, no cache, no padding: each prompt alone, the whole sequence again for every greedy token.

    logits [rows][steps, V] and tokens [rows][steps].
    """
    plain = {**MODELS[model], "moe_expert_capacity_factor": None, "moe_input_jitter_eps": None}
    MODELS["plain"] = plain
    logits, tokens = [], []
    with built("plain", {}) as ((chunk,), _), torch.no_grad():
        chunk.eval()
        for prompt in PROMPTS:
            ids, rows = list(prompt), []
            for _ in range(STEPS):
                every = torch.tensor([ids])
                rows.append(chunk(every, torch.arange(len(ids))[None], None)[0, -1, :VOCAB])
                ids.append(int(rows[-1].argmax()))
            logits.append(torch.stack(rows))
            tokens.append(ids[len(prompt) :])
    return {"logits": torch.stack(logits), "tokens": tokens}


def settings(chunks: Any) -> dict[str, Any]:
    """Everything that generation may have left changed."""
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


def cached(model: str, layout: dict[str, Any], forced: list[list[int]]) -> dict[str, Any]:
    """On this layout: largest logit difference is judged by the caller; tokens of `generate`, greedy and drawn."""
    from megalign.parallel.schedule import from_last_stage
    from megalign.rollout.decoder import Decoder
    from megalign.rollout.generate import _pad_left, generate
    from megalign.rollout.switch import generating

    with built(model, layout) as (chunks, grid):
        before = settings(chunks)
        tokens_BS, first_B = _pad_left(PROMPTS, max(map(len, PROMPTS)))
        steps = []
        with generating(chunks):
            decoder = Decoder(chunks, grid, first_B, tokens_BS.shape[1] + STEPS)
            inputs = tokens_BS
            for step in range(STEPS):
                logits = decoder.step(inputs)
                logits = (
                    torch.empty(len(PROMPTS), chunks[0].vocab_size) if logits is None else logits.contiguous()
                )
                steps.append(from_last_stage(logits, grid)[:, :VOCAB].clone())
                inputs = torch.tensor([row[step] for row in forced])[:, None]
        options: Any = {"max_new_tokens": STEPS, "stop_ids": (), "vocab_size": VOCAB}
        greedy = generate(chunks, grid, PROMPTS, sampling=SamplingParams(temperature=0), **options)
        drawn = generate(chunks, grid, PROMPTS, sampling=SAMPLED, seed=11, **options)
        one = generate(chunks, grid, PROMPTS[2:3], sampling=SamplingParams(temperature=0), **options)
        restored = settings(chunks) == before
        restored_after_error = _after_error(chunks, grid, options, before)
    return {
        "logits": torch.stack(steps, dim=1),
        "greedy": greedy,
        "drawn": drawn,
        "one": one,
        "restored": restored and restored_after_error,
        "changed": len(before),
    }


def _after_error(chunks: Any, grid: Any, options: dict[str, Any], before: dict[str, Any]) -> bool:
    from megalign.rollout.generate import generate

    def fail(row: int, token: int) -> None:
        raise RuntimeError("on_token")

    try:
        generate(chunks, grid, PROMPTS, sampling=SAMPLED, on_token=fail, **options)
    except RuntimeError as error:
        return str(error) == "on_token" and settings(chunks) == before
    return False


def many(cells: list[tuple[str, dict[str, Any], list[list[int]]]]) -> list[dict[str, Any]]:
    """Several layouts, one launch."""
    return [cached(*cell) for cell in cells]

"""Text generation on any layout: prefill, then one token a step for every row, until all rows are done.

Rows are spread over data-parallel ranks. After each step one small all-reduce over the world tells every rank
the tokens of all rows: so all ranks, also the other stages and the neighbours in an expert-parallel group,
take the same number of steps and return the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalign.config.errors import ConfigError
from megalign.parallel.grid import Grid
from megalign.parallel.init import device
from megalign.rollout.decoder import Decoder
from megalign.rollout.sampler import SamplingParams, sample
from megalign.rollout.switch import generating

NOT_FINITE = -1  # in place of a token
OnToken = Callable[[int, int], "bool | None"]


def generate(
    chunks: Sequence[Any],
    grid: Grid,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    vocab_size: int,
    sampling: SamplingParams,
    seed: int = 0,
    on_token: OnToken | None = None,
) -> list[list[int]]:
    """Continue each prompt; return its new tokens, the stop token included if it came (collective).

    All ranks call it with the same arguments (`on_token` apart) and get the same result. A row ends at a
    token of `stop_ids`, after `max_new_tokens`, or where the model's context is full. vocab_size: ids of the
    tokenizer; the padding above is never drawn. The same seed gives the same tokens on every layout, up to
    rounding. on_token(row, token): called for each new token; true ends all rows. What it raises it must
    raise on every rank.
    Raises ConfigError for settings out of range, ValueError for a prompt that cannot be continued,
    FloatingPointError for logits that are not finite.
    """
    chunks = [_unwrap(chunk) for chunk in chunks]
    limit = context_length(chunks)
    _check(chunks, prompts, max_new_tokens, vocab_size, limit)
    if not prompts:
        return []
    room = [min(max_new_tokens, limit - len(prompt)) for prompt in prompts]
    share = -(-len(prompts) // grid.data.size)
    mine = slice(grid.data.rank * share, (grid.data.rank + 1) * share)
    filled = [*prompts, *[[0]] * (share * grid.data.size - len(prompts))]  # rows that nobody asked for
    tokens_BS, first_B = _pad_left(filled, max(map(len, prompts)))
    inputs_BN, seen_BV = tokens_BS[mine], _seen(filled[mine], chunks[-1], vocab_size, sampling)
    draws = torch.Generator().manual_seed(seed)
    done, outputs, stop = [False] * len(prompts), [[] for _ in prompts], False

    with generating(chunks):
        decoder = Decoder(chunks, grid, first_B[mine], tokens_BS.shape[1] + max(room))
        while not all(done):
            logits_BV = decoder.step(inputs_BN)
            uniform_B = torch.zeros(len(filled), dtype=torch.float64)
            uniform_B[: len(prompts)] = torch.rand(len(prompts), generator=draws, dtype=torch.float64)
            drawn = torch.zeros(len(filled) + 1, dtype=torch.int64, device=device())
            if logits_BV is not None and grid.tensor.rank == 0 and grid.context.rank == 0:
                drawn[:-1][mine] = _draw(logits_BV, sampling, vocab_size, uniform_B[mine], seen_BV)
            drawn[-1] = int(stop)
            dist.all_reduce(drawn)
            *tokens, votes = drawn.tolist()
            if NOT_FINITE in tokens:
                raise FloatingPointError("the model's logits are not finite: its weights are broken")
            if votes:
                break
            for row, token in enumerate(tokens[: len(prompts)]):
                if not done[row]:
                    outputs[row].append(token)
                    done[row] = token in stop_ids or len(outputs[row]) == room[row]
                    stop = bool(on_token and on_token(row, token)) or stop
            inputs_BN = drawn[:-1][mine, None]
            if seen_BV is not None:
                seen_BV.scatter_(-1, inputs_BN, True)
    return outputs


def context_length(chunks: Sequence[Any]) -> int:
    """Tokens that the model can hold, prompt and answer together."""
    return int(_unwrap(chunks[0]).max_sequence_length)


def _check(
    chunks: Sequence[Any], prompts: Sequence[Sequence[int]], max_new_tokens: int, vocab_size: int, limit: int
) -> None:
    """Alike on every rank, so that all raise or none."""
    from megalign.parallel.attention import SdpaCoreAttention

    modules = [module for chunk in chunks for module in chunk.modules()]
    cores = [module.core_attention for module in modules if hasattr(module, "core_attention")]
    if not all(isinstance(core, SdpaCoreAttention) for core in cores):
        raise ConfigError(
            "generation pads prompts, which needs the local attention; set model.transformer_impl to local"
        )
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}: it must be at least 1")
    for row, prompt in enumerate(prompts):
        problem = None
        if not prompt:
            problem = "has no token, so there is nothing to continue; begin it with the end-of-document token"
        elif len(prompt) >= limit:
            problem = f"has {len(prompt)} tokens, but the context holds {limit}, answer included; shorten it"
        elif not 0 <= min(prompt) <= max(prompt) < vocab_size:
            found = f"{min(prompt)}..{max(prompt)}"
            problem = (
                f"has tokens {found}, but the vocabulary is 0..{vocab_size - 1}; use the model's tokenizer"
            )
        if problem:
            raise ValueError(f"prompt {row} {problem}")


def _pad_left(prompts: Sequence[Sequence[int]], width: int) -> tuple[Tensor, Tensor]:
    """tokens [B, width], every row ending with its prompt; and the slot of each row's first token [B]."""
    tokens_BS = torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens_BS[row, width - len(prompt) :] = torch.tensor(prompt)
    return tokens_BS, torch.tensor([width - len(prompt) for prompt in prompts])


def _seen(
    prompts: Sequence[Sequence[int]], chunk: Any, vocab_size: int, sampling: SamplingParams
) -> Tensor | None:
    """[B, V] True where a row holds a token; None if nothing asks."""
    if sampling.repetition_penalty == 1:
        return None
    seen_BV = torch.zeros(len(prompts), max(chunk.vocab_size, vocab_size), dtype=torch.bool, device=device())
    for row, prompt in enumerate(prompts):
        seen_BV[row, torch.tensor(prompt)] = True
    return seen_BV


def _draw(
    logits_BV: Tensor, sampling: SamplingParams, vocab_size: int, uniform_B: Tensor, seen_BV: Tensor | None
) -> Tensor:
    """Tokens [B]; NOT_FINITE for a broken row: an error here, on one rank, would leave the others waiting."""
    finite_B = logits_BV[:, :vocab_size].isfinite().all(-1)
    logits_BV = torch.where(finite_B[:, None], logits_BV, 0.0)
    tokens_B, _ = sample(logits_BV, sampling, vocab_size=vocab_size, uniform_B=uniform_B, seen_BV=seen_BV)
    return torch.where(finite_B, tokens_B, NOT_FINITE)


def _unwrap(chunk: Any) -> Any:
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk

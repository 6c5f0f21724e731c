"""From logits to the next token: repetition penalty, temperature, top-k, top-p, one draw.

# B sequences, V rows of the (padded) output table
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megalign.config.errors import ConfigError

OFF = float("-inf")


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen.

    temperature: 0 takes the most probable token; 1 samples from the model's own distribution.
    top_k: only the k most probable tokens (0: all). top_p: only the fewest most probable tokens that hold
    this much probability together (nucleus sampling, Holtzman et al. 2020).
    repetition_penalty: above 1, tokens that the sequence already holds become less likely (CTRL, Keskar et
    al. 2019, section 4.1). Raises ConfigError for a value out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, fine, rule in (
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0; 1 is off"),
        ):
            if not fine:
                raise ConfigError(f"sampling.{name} is {getattr(self, name)}: it must be {rule}")


def sample(
    logits_BV: Tensor,
    params: SamplingParams,
    *,
    vocab_size: int,
    uniform_B: Tensor,
    seen_BV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one token a row: (tokens [B] int64, their log-probabilities [B] FP64 under `distribution`).

    uniform_B: a number in [0, 1) for each row, FP64; the token is where the cumulative distribution passes
    it. A row's token thus depends on its own number alone, not on how rows are spread over ranks.
    """
    logprobs_BV = distribution(logits_BV, params, vocab_size=vocab_size, seen_BV=seen_BV)
    cumulative_BV = logprobs_BV.exp().cumsum(-1)
    # Scaled by the sum as computed: rounding must not leave a number beyond the last token.
    target_B1 = uniform_B.to(cumulative_BV)[:, None] * cumulative_BV[:, -1:]
    tokens_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True)
    return tokens_B1.squeeze(-1), logprobs_BV.gather(-1, tokens_B1).squeeze(-1)


def distribution(
    logits_BV: Tensor, params: SamplingParams, *, vocab_size: int, seen_BV: Tensor | None = None
) -> Tensor:
    """Log-probabilities [B, V] FP64 of the distribution that `sample` draws from; -inf where it never does.

    In this order: rows of padding (id >= vocab_size) out; repetition penalty on the tokens marked in
    `seen_BV`; logits / temperature; top-k; top-p of what is left; normalise.
    """
    logits_BV = logits_BV.double().clone()
    logits_BV[:, vocab_size:] = OFF
    if params.repetition_penalty != 1 and seen_BV is not None:
        weaker_BV = torch.where(
            logits_BV > 0, logits_BV / params.repetition_penalty, logits_BV * params.repetition_penalty
        )
        logits_BV = torch.where(seen_BV, weaker_BV, logits_BV)
    if params.temperature == 0:
        best_B1 = logits_BV.argmax(-1, keepdim=True)
        return torch.full_like(logits_BV, OFF).scatter_(-1, best_B1, 0.0)
    logits_BV /= params.temperature
    if params.top_k or params.top_p < 1:
        logits_BV = _truncate(logits_BV, params.top_k or vocab_size, params.top_p)
    return logits_BV.log_softmax(-1)


def _truncate(logits_BV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Keep the k first of each row, and of these the fewest that reach `top_p`; at least one; ties by id."""
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    sorted_BV[:, top_k:] = OFF
    probs_BV = sorted_BV.softmax(-1)
    before_BV = probs_BV.cumsum(-1) - probs_BV
    # The first token has nothing before it, except what rounding leaves.
    before_BV[:, 0] = 0.0
    sorted_BV[before_BV >= top_p] = OFF
    return torch.empty_like(logits_BV).scatter_(-1, order_BV, sorted_BV)

"""Losses on pairs: one sibling a method, each a loss a pair. `Pairs` says what goes in.

Golden numbers (policy -10, -14; reference -11, -12) and TRL's own functions stand in the tests. Defaults are TRL's;
where reductions differ, the docstring says so. Nothing is averaged here: `PairTerms.summed` adds up.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megalign.losses.pairs import Pairs, PairTerms


def dpo_loss(pairs: Pairs, *, beta: float = 0.1) -> PairTerms:
    """-log sigma(beta delta), delta the difference of log-ratios (Rafailov et al., arXiv:2305.18290, eq. 7).

    log 2 where policy and reference are equal.
    """
    return _terms(-logsigmoid(beta * pairs.delta), pairs, beta)


def cdpo_loss(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.1) -> PairTerms:
    """DPO with a share `label_smoothing` of the labels taken as flipped (Mitchell 2023, conservative DPO).

    TRL 1.16 ignores label_smoothing with its `sigmoid`; this is CPO's smoothing there.
    """
    logits = beta * pairs.delta
    losses = -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)
    return _terms(losses, pairs, beta)


def robust_dpo_loss(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.1) -> PairTerms:
    """Unbiased under labels flipped with probability `label_smoothing` < 1/2 (arXiv:2403.00409, eq. 11)."""
    logits = beta * pairs.delta
    losses = -(1 - label_smoothing) * logsigmoid(logits) + label_smoothing * logsigmoid(-logits)
    return _terms(losses / (1 - 2 * label_smoothing), pairs, beta)


def ipo_loss(pairs: Pairs, *, beta: float = 0.1) -> PairTerms:
    """(delta - 1 / (2 beta))^2 with log-ratios per token (arXiv:2310.12036, eq. 17; its authors mean per token).

    Rewards are of the sums, as in TRL. `ipo_sum_loss` is the form without the division. TRL divides by the tokens of
    the completion mask, which are the scored ones where the prompt is not empty.
    """
    return _terms((pairs.per_token().delta - 1 / (2 * beta)).square(), pairs, beta)


def ipo_sum_loss(pairs: Pairs, *, beta: float = 0.1) -> PairTerms:
    """(delta - 1 / (2 beta))^2 with summed log-ratios: the formula as printed, which grows with length."""
    return _terms((pairs.delta - 1 / (2 * beta)).square(), pairs, beta)


def hinge_loss(pairs: Pairs, *, beta: float = 0.1) -> PairTerms:
    """max(0, 1 - beta delta) (SLiC-HF with the normalisation of RSO, arXiv:2309.06657)."""
    return _terms(torch.relu(1 - beta * pairs.delta), pairs, beta)


def sigmoid_norm_loss(pairs: Pairs, *, beta: float = 0.1) -> PairTerms:
    """DPO with log-ratios per token: -log sigma(beta delta)."""
    return _terms(-logsigmoid(beta * pairs.per_token().delta), pairs, beta)


def rpo_loss(pairs: Pairs, *, beta: float = 0.1, nll_weight: float = 1.0) -> PairTerms:
    """DPO + nll_weight * (-log p of a chosen token) (arXiv:2404.19733, eq. 1); weight 0 is DPO.

    The likelihood term is the mean over each chosen answer's tokens, as the paper has it. TRL's ["sigmoid", "sft"]
    takes the mean over all chosen tokens of a microbatch: equal where answers are equally long.
    """
    return _terms(-logsigmoid(beta * pairs.delta) + nll_weight * pairs.chosen_nll, pairs, beta)


def exo_loss(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 1e-3) -> PairTerms:
    """KL(policy's preference || smoothed label) for two answers (EXO, arXiv:2402.00856, eq. 16); 0 < label_smoothing < 1."""
    logits = beta * pairs.delta
    better, worse = logsigmoid(logits), logsigmoid(-logits)
    smoothing = torch.as_tensor(label_smoothing, dtype=logits.dtype, device=logits.device)
    losses = better.exp() * (better - torch.log1p(-smoothing)) + worse.exp() * (worse - smoothing.log())
    return _terms(losses, pairs, beta)


def nca_loss(pairs: Pairs, *, beta: float = 0.1) -> PairTerms:
    """Noise-contrastive alignment: each reward against 0, so that the chosen answer's does not fall (arXiv:2402.05369)."""
    chosen, rejected = (beta * ratio for ratio in pairs.log_ratios)
    return _terms(-logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected), pairs, beta)


def bco_loss(pairs: Pairs, *, beta: float = 0.1, reward_shift: float = 0.0) -> PairTerms:
    """-log sigma(r_chosen - shift) - log sigma(-(r_rejected - shift)) (BCO, arXiv:2404.04656); shift 0 is TRL's bco_pair.

    reward_shift: the paper's delta, a running mean of (r_chosen + r_rejected) / 2 that the caller keeps.
    """
    chosen, rejected = (beta * ratio - reward_shift for ratio in pairs.log_ratios)
    return _terms(-logsigmoid(chosen) - logsigmoid(-rejected), pairs, beta)


def sppo_hard_loss(pairs: Pairs, *, beta: float = 0.1) -> PairTerms:
    """(log-ratio_chosen - 1/(2 beta))^2 + (log-ratio_rejected + 1/(2 beta))^2 (SPPO, arXiv:2405.00675, eq. 4.7; P is 1 or 0)."""
    chosen, rejected = pairs.log_ratios
    return _terms((chosen - 0.5 / beta).square() + (rejected + 0.5 / beta).square(), pairs, beta)


def aot_loss(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> PairTerms:
    """First-order stochastic dominance of margins: both margins sorted, then compared (AOT, arXiv:2406.05882).

    Sorting is over the pairs given, a microbatch in training: the loss depends on the microbatch size, as in TRL.
    """
    ref_chosen, ref_rejected = pairs.reference
    delta = (pairs.chosen_P - pairs.rejected_P).sort().values - (ref_chosen - ref_rejected).sort().values
    return _terms(_smoothed(beta * delta, label_smoothing), pairs, beta)


def aot_unpaired_loss(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> PairTerms:
    """The same of the log-ratios of chosen against those of rejected answers (arXiv:2406.05882)."""
    chosen, rejected = (ratio.sort().values for ratio in pairs.log_ratios)
    return _terms(_smoothed(beta * (chosen - rejected), label_smoothing), pairs, beta)


def apo_zero_loss(pairs: Pairs, *, beta: float = 0.1) -> PairTerms:
    """1 - sigma(r_chosen) + sigma(r_rejected): chosen answers are better than the model's own (arXiv:2408.06266, eq. 7)."""
    chosen, rejected = (beta * ratio for ratio in pairs.log_ratios)
    return _terms(torch.sigmoid(-chosen) + torch.sigmoid(rejected), pairs, beta)


def apo_down_loss(pairs: Pairs, *, beta: float = 0.1) -> PairTerms:
    """sigma(r_chosen) + 1 - sigma(r_chosen - r_rejected): the model is better than both (arXiv:2408.06266, eq. 8)."""
    chosen, rejected = (beta * ratio for ratio in pairs.log_ratios)
    return _terms(torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen), pairs, beta)


def discopop_loss(pairs: Pairs, *, beta: float = 0.1, tau: float = 0.05) -> PairTerms:
    """Logistic and exponential loss, blended by sigma(beta delta / tau) (arXiv:2406.08414, eq. 5)."""
    logits = beta * pairs.delta
    blend = torch.sigmoid(logits / tau)
    return _terms(-logsigmoid(logits) * (1 - blend) + torch.exp(-logits) * blend, pairs, beta)


def orpo_loss(pairs: Pairs, *, beta: float = 0.1) -> PairTerms:
    """NLL - beta log sigma(log odds ratio), odds of the mean token probability, no reference (arXiv:2403.07691, eq. 6).

    beta: the paper's lambda. The NLL is the mean over each chosen answer's tokens; TRL's is the mean over all tokens of
    the microbatch's chosen sequences, their prompts among them.
    """
    mean = pairs.per_token()
    log_odds = (mean.chosen_P - mean.rejected_P) - (log1mexp(mean.chosen_P) - log1mexp(mean.rejected_P))
    losses = pairs.chosen_nll - beta * logsigmoid(log_odds)
    return PairTerms(losses, beta * mean.chosen_P.detach(), beta * mean.rejected_P.detach())


def simpo_loss(pairs: Pairs, *, beta: float = 2.0, gamma: float = 1.0) -> PairTerms:
    """-log sigma(beta (mean log p_chosen - mean log p_rejected) - gamma), no reference (arXiv:2405.14734, eq. 6).

    TRL's CPOTrainer(loss_type="simpo") adds its cpo_alpha (default 1) times an NLL that SimPO does not have.
    """
    mean = pairs.per_token()
    losses = -logsigmoid(beta * (mean.chosen_P - mean.rejected_P) - gamma)
    return PairTerms(losses, beta * mean.chosen_P.detach(), beta * mean.rejected_P.detach())


def cpo_loss(pairs: Pairs, *, beta: float = 0.1, nll_weight: float = 1.0) -> PairTerms:
    """-log sigma(beta (log p_chosen - log p_rejected)) + nll_weight * NLL, no reference (arXiv:2401.08417, eq. 5).

    The NLL is the mean over each chosen answer's tokens; TRL's is the mean over all chosen tokens of the microbatch.
    """
    losses = -logsigmoid(beta * (pairs.chosen_P - pairs.rejected_P)) + nll_weight * pairs.chosen_nll
    return PairTerms(losses, beta * pairs.chosen_P.detach(), beta * pairs.rejected_P.detach())


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, finite up to x = -1e-6 and exact on both sides of -log 2 (Maechler 2012)."""
    x = x.clamp(max=-1e-6)
    near = x > -0.6931471805599453
    # Both branches see values that are harmless to them: where() multiplies the gradient of the other with 0.
    return torch.where(near, torch.log(-torch.expm1(torch.where(near, x, -0.5))), torch.log1p(-torch.exp(torch.where(near, -1.0, x))))


def _smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


def _terms(losses_P: Tensor, pairs: Pairs, beta: float) -> PairTerms:
    """With DPO's implicit rewards, beta times the log-ratios."""
    chosen, rejected = pairs.log_ratios
    return PairTerms(losses_P, beta * chosen.detach(), beta * rejected.detach())

"""Our preference, reward and distillation losses on random tensors, against TRL's own code.

TRL computes losses inside its trainers' methods; they are called here unbound, with a stand-in trainer and a stand-in
model that returns given log-probabilities. TRL takes means over a microbatch, ours are sums: sum / count is compared.
"""

# pyright: reportMissingImports=false, reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megalign.losses import preference as ours
from megalign.losses.distill import forward_kl_loss, jensen_shannon_loss, reverse_kl_loss
from megalign.losses.pairs import Pairs
from megalign.losses.reward import bradley_terry_loss
from megalign.losses.unpaired import apo_zero_unpaired_loss, kto_baseline, kto_loss

pytestmark = pytest.mark.oracle

PAIRS, WIDTH, PROMPT = 6, 14, 3
accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)


def answers(*, equal_lengths: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Completion mask [2P, WIDTH], per-token log-probs [2P, WIDTH - 1], reference sums [2P]; chosen rows first."""
    draw = torch.Generator().manual_seed(3)
    lengths = torch.full((2 * PAIRS,), 7) if equal_lengths else torch.randint(2, WIDTH - PROMPT + 1, (2 * PAIRS,), generator=draw)
    position = torch.arange(WIDTH)
    mask = ((position >= PROMPT) & (position < PROMPT + lengths[:, None])).long()
    logprobs = -3 * torch.rand(2 * PAIRS, WIDTH - 1, generator=draw) * mask[:, 1:]
    return mask, logprobs, logprobs.sum(-1) + torch.randn(2 * PAIRS, generator=draw) * 3


def as_pairs(mask: torch.Tensor, logprobs: torch.Tensor, reference: torch.Tensor) -> Pairs:
    """The same, as our losses take it."""
    (chosen, rejected), (ref_chosen, ref_rejected) = logprobs.sum(-1).chunk(2), reference.chunk(2)
    chosen_tokens, rejected_tokens = mask.sum(-1).chunk(2)
    return Pairs(chosen, rejected, chosen_tokens, rejected_tokens, ref_chosen, ref_rejected)


def trl_dpo(loss_types: list[str], label_smoothing: float, *, equal_lengths: bool = False) -> tuple[float, dict[str, float]]:
    from trl import DPOTrainer

    mask, logprobs, reference = answers(equal_lengths=equal_lengths)
    outputs = SimpleNamespace(
        log_probs=logprobs, entropy=logprobs * 0, mean_logits=logprobs * 0, is_top1=logprobs > 0, log_sum_sq_probs=logprobs * 0
    )
    metrics: Any = {"train": defaultdict(list), "eval": defaultdict(list)}
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=accelerator, aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True,
        f_divergence_type="reverse_kl", loss_types=loss_types, loss_weights=[1.0, 0.5][: len(loss_types)], beta=0.1, label_smoothing=label_smoothing,
        args=SimpleNamespace(discopop_tau=0.05), use_weighting=False, _metrics=metrics, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    ref_chosen, ref_rejected = reference.chunk(2)
    inputs = {
        "input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask,
        "ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected,
    }  # fmt: skip
    loss: Any = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)  # pyright: ignore[reportArgumentType]
    return float(loss), {name: float(values[-1]) for name, values in metrics["train"].items()}


DPO = {
    "sigmoid": (ours.dpo_loss, 0.0), "hinge": (ours.hinge_loss, 0.0), "ipo": (ours.ipo_loss, 0.0), "exo_pair": (ours.exo_loss, 0.1),
    "nca_pair": (ours.nca_loss, 0.0), "robust": (ours.robust_dpo_loss, 0.1), "bco_pair": (ours.bco_loss, 0.0), "sppo_hard": (ours.sppo_hard_loss, 0.0),
    "aot": (ours.aot_loss, 0.1), "aot_unpaired": (ours.aot_unpaired_loss, 0.1), "apo_zero": (ours.apo_zero_loss, 0.0),
    "apo_down": (ours.apo_down_loss, 0.0), "discopop": (ours.discopop_loss, 0.0), "sigmoid_norm": (ours.sigmoid_norm_loss, 0.0),
}  # fmt: skip


@pytest.mark.parametrize("name", DPO)
def test_dpo_family(name: str):
    function, smoothing = DPO[name]
    wanted, metrics = trl_dpo([name], smoothing)
    pairs = as_pairs(*answers())
    found = function(pairs, beta=0.1, **({"label_smoothing": smoothing} if smoothing else {})).summed(pairs)
    assert (found.sum / found.count).item() == pytest.approx(wanted, rel=1e-5)
    for metric in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"):
        assert (found.metrics[metric] / found.count).item() == pytest.approx(metrics[metric], rel=1e-5, abs=1e-6), metric


def test_names_are_not_mixed_up():
    """Each of TRL's losses has its own value here: one trained in another's place would be seen."""
    values = sorted(trl_dpo([name], smoothing)[0] for name, (_, smoothing) in DPO.items())
    assert min(b - a for a, b in zip(values, values[1:])) > 1e-3


def test_rpo_is_sigmoid_and_sft_where_answers_are_equally_long():
    """And not where they are not: TRL's likelihood term is a mean over the microbatch's tokens, ours over each answer's."""
    for equal in (True, False):
        wanted, _ = trl_dpo(["sigmoid", "sft"], 0.0, equal_lengths=equal)
        pairs = as_pairs(*answers(equal_lengths=equal))
        found = ours.rpo_loss(pairs, beta=0.1, nll_weight=0.5).losses_P.mean().item()
        assert (found == pytest.approx(wanted, rel=1e-5)) is equal
    tokens = pairs.chosen_tokens_P
    by_token = ours.dpo_loss(pairs).losses_P.mean() + 0.5 * (pairs.chosen_nll * tokens).sum() / tokens.sum()
    assert by_token.item() == pytest.approx(wanted, rel=1e-5)


def test_cpo_simpo_and_conservative_dpo():
    """TRL's cpo_loss has no likelihood term (its caller adds it): nll_weight 0. Its smoothing is cDPO's where the reference is 0."""
    from trl.experimental.cpo import CPOTrainer

    pairs = as_pairs(*answers())
    no_reference = replace(pairs, ref_chosen_P=0 * pairs.chosen_P, ref_rejected_P=0 * pairs.chosen_P)
    for name, logprobs, smoothing, found in (
        ("sigmoid", pairs, 0.0, ours.cpo_loss(pairs, beta=0.1, nll_weight=0.0)),
        ("simpo", pairs.per_token(), 0.0, ours.simpo_loss(pairs, beta=2.0, gamma=0.5)),
        ("sigmoid", pairs, 0.2, ours.cdpo_loss(no_reference, label_smoothing=0.2)),
    ):
        beta = 2.0 if name == "simpo" else 0.1
        trainer: Any = SimpleNamespace(alpha=0.0, accelerator=accelerator, loss_type=name, simpo_gamma=0.5, beta=beta, label_smoothing=smoothing)
        losses, chosen, rejected = CPOTrainer.cpo_loss(trainer, logprobs.chosen_P, logprobs.rejected_P)
        torch.testing.assert_close(found.losses_P, losses)
        torch.testing.assert_close(found.chosen_rewards_P, chosen)
        torch.testing.assert_close(found.rejected_rewards_P, rejected)


def test_orpo():
    """The odds-ratio part; the likelihood is added by TRL's caller, over the prompt too."""
    from trl.experimental.orpo import ORPOTrainer

    pairs = as_pairs(*answers())
    mean = pairs.per_token()
    trainer: Any = SimpleNamespace(beta=0.1, accelerator=accelerator)
    losses, chosen, rejected, *_ = ORPOTrainer.odds_ratio_loss(trainer, mean.chosen_P, mean.rejected_P)
    found = ours.orpo_loss(pairs, beta=0.1)
    torch.testing.assert_close(found.losses_P - pairs.chosen_nll, -losses)
    torch.testing.assert_close(found.chosen_rewards_P, chosen)
    torch.testing.assert_close(found.rejected_rewards_P, rejected)


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_kto(name: str):
    from trl import KTOTrainer

    mask, logprobs, reference = answers()
    labels = torch.arange(2 * PAIRS) % 3 != 0
    shifted = logprobs.roll(1, 0) - 0.1 * (logprobs.roll(1, 0) != 0)
    metrics: Any = {"train": defaultdict(list)}
    outputs = {"main": logprobs, "kl": shifted}

    def model(**inputs: Any) -> Any:
        found = outputs["kl" if bool((inputs["input_ids"] == 1).any()) else "main"]
        return SimpleNamespace(log_probs=found, entropy=found * 0, mean_logits=found * 0)

    ref_kl = shifted.sum(-1) - 1.5
    trainer: Any = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=accelerator, aux_loss_enabled=False, precompute_ref_logps=True, loss_type=name,
        calculate_KL=name == "kto", beta=0.1, desirable_weight=1.3, undesirable_weight=0.7, _metrics=metrics, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    trainer._compute_kl_logps = lambda model, batch: KTOTrainer._compute_kl_logps(trainer, model, batch)
    inputs = {
        "input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask, "KL_input_ids": torch.ones_like(mask),
        "KL_attention_mask": torch.ones_like(mask), "KL_completion_mask": mask, "label": labels, "ref_logps": reference, "ref_KL_logps": ref_kl,
    }  # fmt: skip
    wanted: Any = KTOTrainer._compute_loss(trainer, model, inputs, False)
    if name == "kto":
        baseline = kto_baseline(shifted.sum(-1), ref_kl)
        assert baseline.item() == pytest.approx(metrics["train"]["kl"][-1]) == pytest.approx(1.5, rel=1e-5)
        found = kto_loss(logprobs.sum(-1), reference, labels, baseline, beta=0.1, desirable_weight=1.3, undesirable_weight=0.7)
        assert (found.sum / found.count).item() == pytest.approx(float(wanted), rel=1e-5)
    else:  # TRL applies the two weights here as well
        parts = [apo_zero_unpaired_loss(logprobs.sum(-1), reference, labels, beta=0.1, weights_N=kind.float()).sum for kind in (labels, ~labels)]
        assert ((1.3 * parts[0] + 0.7 * parts[1]) / len(labels)).item() == pytest.approx(float(wanted), rel=1e-5)
        found = apo_zero_unpaired_loss(logprobs.sum(-1), reference, labels, beta=0.1)
    for metric, (total, count) in found.ratios.items():
        assert (total / count).item() == pytest.approx(metrics["train"][metric][-1], rel=1e-5), metric


def test_reward_modelling():
    from trl import RewardTrainer

    torch.manual_seed(1)
    scores, margin = torch.randn(2 * PAIRS, 1), torch.rand(PAIRS)
    metrics: Any = {"train": defaultdict(list)}
    trainer: Any = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=accelerator, args=SimpleNamespace(center_rewards_coefficient=0.01), _metrics=metrics,
        _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    for with_margin in (False, True):
        inputs: dict[str, Any] = {"attention_mask": torch.ones(2 * PAIRS, 3), **({"margin": margin} if with_margin else {})}
        wanted: Any = RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=scores), inputs)
        chosen, rejected = scores.squeeze(-1).chunk(2)
        found = bradley_terry_loss(chosen, rejected, margin_P=margin if with_margin else 0.0, centering=0.01)
        assert (found.sum / found.count).item() == pytest.approx(float(wanted), rel=1e-5)
        for name in ("accuracy", "margin", "mean_reward"):
            assert (found.metrics[name] / found.count).item() == pytest.approx(metrics["train"][name][-1], rel=1e-5), name


def test_distillation():
    """TRL's beta 0 is KL(teacher || student), beta 1 the reverse."""
    from trl.experimental.gkd import GKDTrainer

    torch.manual_seed(2)
    student, teacher = torch.randn(5, 11), torch.randn(5, 11)
    for beta, found in (
        (0.0, forward_kl_loss(student, teacher, temperature=0.9)),
        (1.0, reverse_kl_loss(student, teacher, temperature=0.9)),
        (0.3, jensen_shannon_loss(student, teacher, beta=0.3, temperature=0.9)),
    ):
        wanted = GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, temperature=0.9, reduction="sum")
        assert found.sum.item() == pytest.approx(float(wanted), rel=1e-5)

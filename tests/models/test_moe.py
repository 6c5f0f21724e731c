"""Router, experts and dispatch against the mixture written out from the weights (P6, P7, P8, P12)."""

from __future__ import annotations

import functools
import math

import moe_checks
import pytest
from ranks import run_ranks

from megalign.parallel.patches import install

MIXTURES = [(1, False, 4), (2, True, 4), (2, False, 4), (4, True, 4), (4, False, 4), (8, True, 16)]


@pytest.mark.parametrize("topk, normalised, experts", MIXTURES)
def test_the_layer_is_the_weighted_mixture_of_its_experts(topk: int, normalised: bool, experts: int):
    assert run_ranks(moe_checks.check_mixture, 1, topk, normalised, experts)[0] < 1e-5


def test_the_shared_expert_is_always_added():
    assert run_ranks(moe_checks.check_shared, 1)[0] < 1e-5


def test_auxiliary_loss_is_least_for_uniform_and_greatest_for_collapsed_routing():
    """E * sum_e f_e P_e (Switch, arXiv:2101.03961, eq. 4): 1 for uniform routing, E = 4 when one expert takes all."""
    found = run_ranks(moe_checks.check_auxiliary_loss, 1)[0]
    assert found["uniform"] == pytest.approx(1, abs=1e-4) and found["collapsed"] == pytest.approx(4, abs=1e-3)
    assert found["uniform"] < found["random"] < found["collapsed"]


def test_z_loss_is_the_mean_square_of_logsumexp():
    found, expected = run_ranks(moe_checks.check_z_loss, 1)[0]
    assert found == pytest.approx(expected, rel=1e-5) and expected > 0.1


@pytest.mark.parametrize("world", [1, 2])
def test_auxiliary_losses_do_not_look_at_padding(world: int):
    for rank in run_ranks(moe_checks.check_padding, world):
        assert rank == pytest.approx({"balance": 0, "z": 0, "gradient": 0}, abs=1e-5)


def test_without_its_patch_the_z_loss_of_padded_rows_depends_on_the_layout():
    ranks = run_ranks(moe_checks.check_padding, 2, before=functools.partial(install, skip=["padded-z-loss"]))
    assert abs(ranks[0]["z"]) > 0.01


def test_a_microbatch_of_padding_alone_has_no_auxiliary_loss():
    """Seen in a run: the last step of an epoch, filled up with empty rows, stopped it with NaN gradients."""
    assert run_ranks(moe_checks.check_padding_alone, 1) == [0.0]
    without = functools.partial(install, skip=["empty-aux-loss"])
    assert math.isnan(run_ranks(moe_checks.check_padding_alone, 1, before=without)[0])


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_no_token_is_lost_in_dispatch(world: int, dispatcher: str):
    for rank in run_ranks(moe_checks.check_conservation, world, dispatcher, None):
        assert rank["whole"] < 1e-5 and rank["dropped"] == 0 and rank["incomplete"] == 0
        assert sum(rank["load"][0]) == pytest.approx(1)


def test_dropped_tokens_are_counted():
    ranks = run_ranks(moe_checks.check_conservation, 2, "alltoall", 0.5)
    assert ranks[0]["dropped"] == ranks[1]["dropped"] > 0
    assert sum(rank["incomplete"] for rank in ranks) > 0
    assert all(rank["same factor over a token"] < 1e-4 for rank in ranks)

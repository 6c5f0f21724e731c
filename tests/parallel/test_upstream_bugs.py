"""Known errors of megatron-core 0.16.1 and its neighbours: wrong without our reduction, right with it.

The oracle is one process. Wrong: exactly the parameters named are off by far more than P13's tolerance, on every rank
that holds one. Right: none is. Elsewhere: the expert bias in BF16 (Megatron-LM 1482, tests/models/test_expert_bias.py),
Adam's shared step (test_patches.py), MLA's rotary key (Megatron-LM 6839, test_layouts.py), which our rules forbid.
"""

from __future__ import annotations

import functools
import pickle
import re
from typing import Any

import pytest
import upstream_runs
import upstream_schedules
from ranks import run_ranks
from upstream_bugs import BUGS
from upstream_schedules import SCHEDULES


@functools.cache
def expected(world: int) -> dict[str, dict[str, Any]]:
    return run_ranks(upstream_runs.oracles, 1, [name for name, bug in BUGS.items() if bug.world == world])[0]


@functools.cache
def studies(world: int) -> list[dict[str, Any]]:
    """What each rank found, for all bugs that show on `world` ranks, in one launch."""
    oracles = expected(world)
    return run_ranks(upstream_runs.study, world, list(oracles), pickle.dumps(oracles))


@pytest.mark.parametrize("name", BUGS)
def test_wrong_without_and_right_with_our_reduction(name: str):
    bug = BUGS[name]
    ranks = [rank[name] for rank in studies(bug.world)]
    for rank in ranks:
        assert rank["right"]["errors"] == {} and rank["right"]["compared"] > 0
        assert rank["right"]["norm"] == pytest.approx(1, abs=1e-6) and rank["right"]["loss"] <= 1e-6
    wrong: dict[str, float] = {}
    for rank in ranks:
        assert rank["wrong"]["loss"] <= 1e-6  # the forward pass is right: nothing shows but the gradients
        wrong |= rank["wrong"]["errors"]
    if not bug.norm_only:
        assert max(wrong.values()) > 100
        assert all(re.search(bug.parameters, parameter) for parameter in wrong), wrong
        return
    oracle = expected(bug.world)[name]
    twice = sum(float(g.square().sum()) for parameter, g in oracle["grads"].items() if re.search(bug.parameters, parameter))
    assert not wrong
    for rank in ranks:  # sqrt(all + what two ranks count once too often)
        assert rank["wrong"]["norm"] == pytest.approx((1 + twice / oracle["norm"] ** 2) ** 0.5, abs=1e-6)
        assert rank["wrong"]["norm"] > 1 + 1e-5


REFUSED = BUGS.keys() - {"tied embedding, distributed", "per-head norms"}  # these two are in no flag of a parameter


@pytest.mark.parametrize("world", [2, 4])
def test_what_flags_do_not_settle_is_refused_by_name(world: int):
    """Placing the parameters says no before the first step; `declare` is in the words of the error."""
    names = [name for name, bug in BUGS.items() if bug.world == world]
    for rank in run_ranks(upstream_runs.refusals, world, names):
        assert {name for name in names if rank[name]} == REFUSED & set(names)
        for name in REFUSED & set(names):
            assert re.search(BUGS[name].parameters, rank[name]), rank[name]


@functools.cache
def schedule_oracle(multiple: int) -> bytes:
    return pickle.dumps(run_ranks(upstream_schedules.schedule_oracle, 1, multiple)[0])


RACE = "outputs of virtual stages freed while they are sent"


@pytest.mark.parametrize("name", SCHEDULES)
def test_wrong_on_a_schedule(name: str):
    layout, multiple, _ = SCHEDULES[name]
    world = 1 if name.endswith("zeroed") else 2
    ranks = run_ranks(upstream_schedules.schedule_error, world, name, schedule_oracle(multiple))
    assert max(right for _, right in ranks) <= 1
    assert max(wrong for wrong, _ in ranks) > 100 or name == RACE


@pytest.mark.soak
def test_the_race_is_lost_now_and_then():
    """Freed outputs are wrong only if the sender is late: most launches show it, not every one."""
    _, multiple, _ = SCHEDULES[RACE]
    launches = (run_ranks(upstream_schedules.schedule_error, 2, RACE, schedule_oracle(multiple)) for _ in range(20))
    assert any(max(wrong for wrong, _ in ranks) > 100 for ranks in launches)

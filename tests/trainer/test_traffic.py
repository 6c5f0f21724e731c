"""P19: communication bytes a step by axis and collective, against those of real steps."""

from __future__ import annotations

import pytest
from ranks import run_ranks
from test_memory import DENSE, MOE, UNIFORM, VOCABULARY, case, selective
from traffic_checks import count

from megalign.config.communication import traffic_of
from megalign.config.layout import layout_of, padded_vocab
from megalign.config.schema import Recipe

PLAIN = {**MOE, "moe_aux_loss_coeff": 0.0}
AHEAD = {**DENSE, "mtp_num_layers": 1}
TIED = {**DENSE, "share_embeddings_and_output_weights": True}
CASES = {
    2: [
        case(DENSE, {"tp": 2}),
        case(DENSE, {"tp": 2, "sp": True}, precision="bf16"),
        case(DENSE, {"tp": 2}, **UNIFORM),
        case(DENSE, {"tp": 2, "sp": True}, **selective("mlp")),
        case(PLAIN, {"ep": 2}),
        case(PLAIN, {"ep": 2, "use_distributed_optimizer": False}, **selective("moe")),
        case(DENSE, {"cp": 2}),
        case(DENSE, {"cp": 2}, **selective("core_attn")),
        case(TIED, {"pp": 2}),
        case(DENSE, {"pp": 2, "vpp": 2}),
        case(DENSE, {"use_distributed_optimizer": False}, precision="bf16"),
        case(AHEAD, {"tp": 2, "sp": True}),
        case(AHEAD, {"tp": 2}),
        case({**PLAIN, "mtp_num_layers": 1}, {"pp": 2}),
    ],
    4: [case({**PLAIN, "num_layers": 5}, {"tp": 2, "pp": 2, "sp": True, "ep": 2, "num_layers_in_first_pipeline_stage": 3})],
}


@pytest.mark.parametrize("world", CASES)
def test_planned_bytes_are_those_of_a_step(world: int):
    """Within 2 %: what is left out is counts, norms and metrics. Every axis that talks is named, and no other."""
    ranks = run_ranks(count, world, [(given, VOCABULARY) for given in CASES[world]])
    wrong = []
    for number, given in enumerate(CASES[world]):
        recipe = Recipe.model_validate(given)
        layout = layout_of(recipe, world)
        rows = padded_vocab(VOCABULARY, layout.tp)
        scored = (recipe.data.sequence_length - 2) / recipe.data.sequence_length
        for found in (rank[number] for rank in ranks):
            planned: dict[str, float] = {}
            for traffic in traffic_of(recipe, layout, rows, found["stage"], scored=scored):
                key = f"{traffic.axis} {traffic.operation}"
                planned[key] = planned.get(key, 0) + traffic.payload
            largest = max(found["sent"].values())
            for key in planned.keys() | found["sent"].keys():
                plan, real = planned.get(key, 0), found["sent"].get(key, 0)
                if abs(plan - real) > max(0.02 * real, 1e-3 * largest):
                    wrong.append(f"{given['model'].get('num_moe_experts')} {given['parallel']} {given['train']} stage {found['stage']} {key}: planned {plan:,.0f}, counted {real:,}")
    assert not wrong, "\n".join(sorted(set(wrong)))

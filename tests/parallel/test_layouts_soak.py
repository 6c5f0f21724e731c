"""P13 on eight ranks: the same comparison on layouts that two cores do not start in every test run."""

from __future__ import annotations

from typing import Any

import layout_checks
import pytest
from ranks import run_ranks
from test_layouts import MODELS, one_process, worst_gradient

pytestmark = pytest.mark.soak

CELLS: list[tuple[str, dict[str, Any]]] = [
    ("moe", dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, expert_model_parallel_size=4, sequence_parallel=True)),
    ("moe", dict(pipeline_model_parallel_size=4, expert_model_parallel_size=2)),
    ("tied", dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=4, sequence_parallel=True)),
    ("dense", dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)),
]


@pytest.mark.parametrize("model, layout", CELLS)
def test_layout_on_eight_ranks(model: str, layout: dict[str, Any]):
    expected = one_process(model, 1)
    found = run_ranks(layout_checks.gradients, 8, MODELS[model], layout, {})[0]
    assert found["losses"][0] == pytest.approx(expected["losses"][0], rel=1e-6)
    ratio, name = worst_gradient(found, expected)
    assert ratio <= 1, f"{name}: {ratio:.1f} times the tolerance"

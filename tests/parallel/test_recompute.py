"""Recomputed activations give the gradients of kept ones: bitwise on one rank, within P13 on every layout.

Recomputed norms are the exception on one rank. Where a norm's input forks (to its square and to the residual), its
three gradients are added in another order: P13 holds there (measured: 0.03 of its tolerance), bitwise does not.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import layout_checks
import pytest
import torch
from ranks import run_ranks
from test_layouts import DENSE, MOE, PP2, TP2, one_process, worst_gradient

from megalign.parallel.patches import install

KEPT: dict[str, Any] = {}
UNIFORM = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
PAIRS = {**UNIFORM, "recompute_num_layers": 2}
BLOCK = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 3}


def selective(*modules: str) -> dict[str, Any]:
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


WAYS = {
    "dense": [UNIFORM, PAIRS, BLOCK, selective("core_attn"), selective("layernorm"), selective("mlp"), selective("core_attn", "layernorm", "mlp")],
    "moe": [UNIFORM, PAIRS, BLOCK, selective("core_attn"), selective("layernorm"), selective("moe"), selective("shared_experts"),
            selective("core_attn", "layernorm", "moe")],
}  # fmt: skip
MODELS = {"dense": DENSE, "moe": MOE}


@pytest.mark.parametrize("noise", [False, True], ids=["plain", "dropout and jitter"])
@pytest.mark.parametrize("model", MODELS)
def test_one_rank_equals_itself(model: str, noise: bool):
    """The same kernels on the same numbers, and with dropout the same random ones. The rows hold padding, which the
    routers' auxiliary losses must go on leaving out."""
    shape = dict(MODELS[model])
    if noise:
        shape |= {"hidden_dropout": 0.1, "attention_dropout": 0.1} | ({"moe_input_jitter_eps": 0.1} if model == "moe" else {})
    cases = [(shape, {}, {"megatron": way, "seed": 5}) for way in (KEPT, *WAYS[model])]
    kept, *again = run_ranks(layout_checks.sweep, 1, cases)[0]
    for way, found in zip(WAYS[model], again, strict=True):
        assert found["losses"] == kept["losses"], way
        if "layernorm" in way.get("recompute_modules", ()):
            assert worst_gradient(found, kept)[0] <= 1, way
            continue
        for name, gradient in kept["grads"].items():
            assert torch.equal(found["grads"][name], gradient), (way, name)


LAYOUTS: list[tuple[int, str, dict[str, Any], dict[str, Any]]] = [
    (2, "moe", {"expert_model_parallel_size": 2}, selective("moe", "layernorm")),
    (2, "moe", {"context_parallel_size": 2}, UNIFORM),
    (2, "moe", TP2, {**BLOCK, "recompute_num_layers": 2}),
    (2, "dense", {**PP2, "virtual_pipeline_model_parallel_size": 2}, UNIFORM),
    (4, "moe", {**TP2, **PP2, "expert_model_parallel_size": 2}, PAIRS),
    (4, "moe", {**TP2, **PP2, "expert_model_parallel_size": 2}, selective("core_attn", "layernorm", "moe")),
]


@pytest.mark.parametrize("world", [2, 4])
def test_layouts_equal_one_process_that_keeps(world: int):
    """P13 with recomputation; the oracle is one process that keeps everything."""
    cells = [cell for cell in LAYOUTS if cell[0] == world]
    multiples = [4 if "context_parallel_size" in layout else 1 for _, _, layout, _ in cells]
    cases = [
        (MODELS[model], layout, {"megatron": way, "document_multiple": multiple})
        for (_, model, layout, way), multiple in zip(cells, multiples, strict=True)
    ]
    for (_, model, layout, way), multiple, found in zip(cells, multiples, run_ranks(layout_checks.sweep, world, cases)[0], strict=True):
        expected = one_process(model, multiple)
        assert found["losses"][0] == pytest.approx(expected["losses"][0], rel=1e-6)
        ratio, name = worst_gradient(found, expected)
        assert ratio <= 1, f"{layout} {way} {name}: {ratio:.1f} times the tolerance"


def test_without_the_block_patch_routers_see_padding():
    before = functools.partial(install, skip=["block-padding"])
    kept, block = run_ranks(layout_checks.sweep, 1, [(MOE, {}, {}), (MOE, {}, {"megatron": BLOCK})], before=before)[0]
    ratio, name = worst_gradient(block, kept)
    assert ratio > 100 and "router" in name


def test_without_the_te_patch_norms_are_not_recomputed():
    before = functools.partial(install, skip=["recompute-without-te"])
    with pytest.raises(AssertionError, match="FP8GlobalStateManager"):
        run_ranks(layout_checks.gradients, 1, DENSE, {}, {"megatron": selective("layernorm")}, before=before)


def test_frozen_embeddings_do_not_freeze_the_rest():
    """Reentrant checkpoints need an input that wants a gradient."""
    found = run_ranks(layout_checks.gradients, 1, DENSE, {}, {"megatron": UNIFORM, "frozen": "embedding"})[0]
    expected = one_process("dense", 1)
    for name, gradient in expected["grads"].items():
        if name.startswith("embedding"):
            assert name not in found["grads"] or not found["grads"][name].any()
        else:
            assert torch.equal(found["grads"][name], gradient), name


UNEVEN: list[tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    (2, {}, PP2, {"num_layers_in_first_pipeline_stage": 3}),
    (2, {"share_embeddings_and_output_weights": True}, PP2, {"pipeline_model_parallel_layout": "Ettttt|L"}),
    (2, {}, {**PP2, "virtual_pipeline_model_parallel_size": 2}, {"pipeline_model_parallel_layout": "E|tt|tt|tL"}),
    (2, {"num_layers": 6}, {**PP2, "virtual_pipeline_model_parallel_size": 2}, {"num_layers_in_last_pipeline_stage": 2}),
    (4, {}, {"pipeline_model_parallel_size": 4}, {"num_layers_in_first_pipeline_stage": 1, "num_layers_in_last_pipeline_stage": 2}),
    (4, {}, {"pipeline_model_parallel_size": 4}, {"pipeline_model_parallel_layout": "Ettt|(t|)*2L", **UNIFORM}),
    (4, {}, {**TP2, **PP2, "expert_model_parallel_size": 2}, {"num_layers_in_last_pipeline_stage": 2, **selective("moe")}),
]


@pytest.mark.parametrize("world", [2, 4])
def test_uneven_stages_equal_one_process(world: int):
    """P13 for five layers (and six); weights are initialised by name, so that each layer is the one process's."""
    cells = [cell for cell in UNEVEN if cell[0] == world]
    base = {**MOE, "num_layers": 5}
    expected = run_ranks(layout_checks.sweep, 1, [({**base, **model}, {}, {}) for _, model, _, _ in cells])[0]
    cases = [({**base, **model}, layout, {"megatron": options}) for _, model, layout, options in cells]
    found = run_ranks(layout_checks.sweep, world, cases)[0]
    for cell, mine, theirs in zip(cells, found, expected, strict=True):
        assert mine["losses"][0] == pytest.approx(theirs["losses"][0], rel=1e-6), cell
        ratio, name = worst_gradient(mine, theirs)
        assert ratio <= 1, f"{cell} {name}: {ratio:.1f} times the tolerance"


def test_a_checkpoint_of_uneven_stages_opens_elsewhere(tmp_path: Path):
    """Saved by stages of 3 and 2 layers, opened by one rank and by stages of 1 and 4: weights, and the loss after another step."""
    model = {**MOE, "num_layers": 5}
    options = {"num_layers_in_first_pipeline_stage": 3}
    saved = run_ranks(layout_checks.weights_of_checkpoint, 2, model, PP2, options, tmp_path, None)[0]
    for world, layout, cut in ((1, {}, {}), (2, PP2, {"pipeline_model_parallel_layout": "Et|ttttL"})):
        opened = run_ranks(layout_checks.weights_of_checkpoint, world, model, layout, cut, tmp_path, saved["path"])[0]
        assert opened["loss"] == pytest.approx(saved["loss"], rel=1e-5)
        for name, weight in saved["weights"].items():
            assert torch.equal(opened["weights"][name], weight), name

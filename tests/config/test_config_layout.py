"""Sizes that follow from the layout: batch, learning rate, steps, padded vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalign.config.advice import warnings
from megalign.config.layout import effective_batch, layout_of, padded_vocab, scaled_lr, total_steps
from megalign.config.schema import Recipe


def recipe(**sections: Any) -> Recipe:
    return Recipe.model_validate(sections)


def test_the_effective_batch_is_the_same_however_it_is_cut():
    """P16: 4 * 8 * 1 = 4 * 2 * 4 = 32."""
    given = recipe(train={"micro_batch_size": 4, "global_batch_size": 32})
    assert effective_batch(given, layout_of(given, 1)) == "micro(4) * microbatches(8) * dp(1) = 32 rows a step"
    assert effective_batch(given, layout_of(given, 4)) == "micro(4) * microbatches(2) * dp(4) = 32 rows a step"


def test_the_learning_rate_is_scaled_only_when_asked():
    """P16: four times the ranks and linear: 8e-4 from 2e-4."""
    base = {"lr": 2e-4}
    assert scaled_lr(recipe(optimizer=base), 4) == 2e-4
    assert scaled_lr(recipe(optimizer={**base, "scale_lr_with_data_parallel": "linear"}), 4) == pytest.approx(8e-4)
    assert scaled_lr(recipe(optimizer={**base, "scale_lr_with_data_parallel": "sqrt"}), 4) == pytest.approx(4e-4)


def test_the_axes_of_a_layout():
    moe = {"num_moe_experts": 8}
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "expert_model_parallel_size": 4}
    layout = layout_of(recipe(model=moe, parallel=sizes, train={"global_batch_size": 32}), 32)
    assert (layout.dp, layout.etp, layout.expert_dp, layout.microbatches) == (8, 1, 4, 4)
    dense = layout_of(recipe(parallel={"tensor_model_parallel_size": 2}), 8)
    assert (dense.dp, dense.etp, dense.expert_dp, dense.vpp) == (4, 2, 4, 1)


@given(st.integers(1, 200_000), st.sampled_from([1, 2, 3, 4, 8]))
def test_padded_vocabulary_is_the_least_multiple_of_128_and_tp(vocab, tp):
    padded = padded_vocab(vocab, tp)
    multiple = 384 if tp == 3 else 128
    assert padded % multiple == 0 and vocab <= padded < vocab + multiple


@given(st.integers(1, 200_000))
def test_a_checkpoint_keeps_its_rows_on_other_layouts(vocab):
    assert len({padded_vocab(vocab, tp) for tp in (1, 2, 4, 8, 16)}) == 1


@pytest.mark.parametrize(
    "rows,batch,epochs,remainder,steps",
    [
        (16, 8, 1.0, "pad", 2),
        (17, 8, 1.0, "pad", 3),
        (17, 8, 1.0, "drop", 2),
        (17, 8, 2.0, "pad", 6),
        (16, 8, 0.5, "pad", 1),
        (400, 8, 1.1, "pad", 55),  # 1.1 * 50 = 55.00000000000001
        (17, 8, 0.4, "pad", 2),
    ],
)
def test_steps_of_a_run(rows, batch, epochs, remainder, steps):
    given = recipe(train={"global_batch_size": batch, "epochs": epochs}, data={"remainder": remainder})
    assert total_steps(given, rows) == steps
    assert total_steps(given, None) is None
    assert total_steps(recipe(train={"max_steps": 7}), rows) == total_steps(recipe(train={"max_steps": 7}), None) == 7


QUIET = {"model": {"init_from": "folder"}, "optimizer": {"lr": 2e-5, "lr_warmup_steps": 5}, "train": {"max_steps": 100}}
FROM_SCRATCH = {"lr": 1e-3, "lr_warmup_steps": 5}


def test_a_usual_recipe_has_no_warnings():
    assert warnings(recipe()) == []
    assert warnings(recipe(**QUIET)) == []


@pytest.mark.parametrize(
    "change,words",
    [
        ({"optimizer": {"lr": 1e-3, "lr_warmup_steps": 5}}, "optimizer.lr=0.001 is above the usual 1e-06 to 5e-05"),
        ({"optimizer": {"lr": 1e-7, "lr_warmup_steps": 5}}, "optimizer.lr=1e-07 is below"),
        ({"train": {"epochs": 4}}, "train.epochs=4"),
        ({"optimizer": {"lr": 2e-5, "lr_warmup_steps": 2}}, "2% of 100 steps; 3% to 10% is usual, here 3 to 10"),
        ({"optimizer": {"lr": 2e-5, "lr_warmup_steps": 11}}, "11% of 100 steps"),
        ({"optimizer": {"lr": 2e-5}}, "optimizer.lr_warmup_steps=0 is 0% of 100 steps"),
        ({"data": {"sequence_length": 8192}}, "beyond model.max_position_embeddings=4096"),
        ({"model": {}}, "model.init_from=null: the weights are random, and optimizer.lr=2e-05 is a rate of fine-tuning"),
        ({"model": {"hidden_dropout": 0.1}, "optimizer": FROM_SCRATCH}, "depend on the parallel layout"),
        ({"kernels": {"fp8_backend": "triton"}}, "kernels.fp8_backend=triton: no layer of a recipe computes in FP8 yet"),
        ({"parallel": {"overlap_param_gather": True}}, "all parameters are one bucket"),
        ({"model": {"num_moe_experts": 4}, "optimizer": FROM_SCRATCH}, "moe_aux_loss_coeff=0"),
        ({"model": {"num_moe_experts": 4, "moe_aux_loss_coeff": 0.01, "moe_expert_capacity_factor": 0.5}, "optimizer": FROM_SCRATCH}, "capacity_factor=0.5"),
    ],
)
def test_a_warning_alone(change, words):
    found = warnings(recipe(**{**QUIET, **change}))
    assert len(found) == 1 and words in found[0]


def test_ranges_of_fine_tuning_are_not_those_of_training_from_scratch():
    assert warnings(recipe(optimizer={"lr": 3e-3}, train={"max_steps": 100})) == []
    edge = {"model": {"init_from": "folder"}, "train": {"max_steps": 100, "epochs": 9}}
    assert all(warnings(recipe(**edge, optimizer={"lr": lr, "lr_warmup_steps": 3})) == [] for lr in (1e-6, 5e-5))


def test_scaling_with_a_fixed_batch_is_mentioned():
    scaled = recipe(optimizer={"scale_lr_with_data_parallel": "linear"})
    assert warnings(scaled, 1) == []
    (message,) = warnings(scaled, 4)
    assert "stays train.global_batch_size=8 rows" in message

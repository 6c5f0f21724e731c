"""KTO's loss, baseline, metrics and gradients of one global batch on any layout, for comparison with one process."""

from __future__ import annotations

from typing import Any

import numpy as np


def steps(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`step` of several recipes, one after the other in one launch."""
    return [step(case) for case in cases]


def mutants(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`step` with one thing wrong at a time."""
    from unittest import mock

    import torch

    from megalign import kto
    from megalign.data.mismatched import MismatchedRows
    from megalign.models.sequences import sequence_tokens

    sequence_logprobs, kto_loss = kto.sequence_logprobs, kto.kto_loss

    def shifted(output: Any, batch: Any, grid: Any) -> Any:
        return sequence_logprobs(torch.roll(output, 1, -1), batch, grid)

    def mean(output: Any, batch: Any, grid: Any) -> Any:
        return sequence_logprobs(output, batch, grid) / sequence_tokens(batch)

    wrong = {
        "baseline of each rank": mock.patch.object(kto, "sum_over", lambda value, group: value),
        "own answers": mock.patch.object(MismatchedRows, "__getitem__", lambda self, index: self.rows[index]),
        "sums shifted by one token": mock.patch.object(kto, "sequence_logprobs", shifted),
        "mean for sum": mock.patch.object(kto, "sequence_logprobs", mean),
        "kinds exchanged": mock.patch.object(kto, "kto_loss", lambda a, b, desirable, *rest, **more: kto_loss(a, b, ~desirable, *rest, **more)),
        "weights dropped": mock.patch.object(kto, "kto_loss", lambda *rest, **more: kto_loss(*rest, beta=more["beta"], weights_N=more["weights_N"])),
        "denominator of the rank": mock.patch.object(kto, "answer_weight", lambda batch: 1.0),
    }
    found = {}
    for name, patch in wrong.items():
        with patch:
            found[name] = step(case, precise=False)
    return found


def references(dataset: Any, swing: float) -> np.ndarray:
    """[N, 1] log-probs of an imagined reference: some above the policy's, some below, so that ranks' means differ in sign."""
    tokens = np.array([int(row[0].loss_mask.sum()) for row in dataset.rows])
    return (-5.9 * tokens + swing * np.cos(2.0 * np.arange(len(tokens))))[:, None]


def step(case: dict[str, Any], precise: bool = True) -> dict[str, Any]:
    """Means and full gradients of the first step, in FP32 and (precise) in FP64; on one rank also each document's log-prob on its own."""
    import os

    from dpo_layout_checks import _main_grad
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

    from megalign.config.schema import Recipe
    from megalign.data.answers import build_answers
    from megalign.data.mismatched import mismatched
    from megalign.kto import Baseline, answer_loss, answer_weight
    from megalign.models.sequences import sequence_logprobs
    from megalign.models.weights import stream_full
    from megalign.parallel.grid import destroy_grid
    from megalign.parallel.init import read_world
    from megalign.parallel.optimizer import zero_gradients
    from megalign.trainer.batches import Batches
    from megalign.trainer.engine import Engine
    from megalign.trainer.objective import Objective
    from megalign.trainer.reference import REF_LOGPROB, columns_of
    from megalign.trainer.run import grid_of

    get_moe_layer_wise_logging_tracker().clear()
    recipe = Recipe.model_validate(case)
    grid = grid_of(recipe, read_world(os.environ))
    train, validation = build_answers(recipe)
    others = {"train": mismatched(train, recipe), "validation": mismatched(validation, recipe)}
    columns_of(train)[REF_LOGPROB] = references(train, 3.0)
    columns_of(others["train"])[REF_LOGPROB] = references(others["train"], 30.0)
    engine = Engine(recipe, grid, train.tokenizer.vocab_size)
    dealt = Batches(train, recipe, grid)
    mine, _ = dealt.next_step()
    objective = Objective(answer_loss(recipe, grid), count=answer_weight, prepare=Baseline(engine, others, None).prepare)
    zero_gradients(engine.chunks, engine.optimizer)
    sums, _ = engine._run(mine, objective, forward_only=False)
    grads = {name: full.clone() for name, full in stream_full(engine.chunks, grid, value=_main_grad)}
    documents = {}
    if grid.world == 1:
        for name, dataset in (("answers", train), ("mismatched", others["train"])):
            found = [engine.score([dealt.collate([row])], lambda output, batch: sequence_logprobs(output, batch, grid))[0].item() for row in dataset.rows]
            documents[name] = (found, columns_of(dataset)[REF_LOGPROB][:, 0].tolist())
        documents["desirable"] = columns_of(train)["desirable"][:, 0].tolist()
    rows = [int(row) for batch in mine if batch.values for row in batch.values["row"]]
    double = in_float64(engine, mine, objective) if precise else {}
    destroy_grid()
    return {"rows": rows, "means": sums.means(), "count": sums.count, "grads": grads, "double": double, "documents": documents}


def in_float64(engine: Any, mine: Any, objective: Any) -> dict[str, Any]:
    """Full gradients of the same step on an FP64 copy of the model, which its baseline is computed with too."""
    from dpo_layout_checks import _main_grad

    from megalign.models.forward import scored_logprobs
    from megalign.models.weights import named_parameters, stream_full
    from megalign.parallel.audit.probe import in_double, kept_in_double
    from megalign.parallel.optimizer import wrap_data_parallel
    from megalign.parallel.placement import place
    from megalign.parallel.reduction import attach
    from megalign.parallel.schedule import forward_backward
    from megalign.trainer.objective import denominators, scalar_and_sums

    grid = engine.grid
    objective.prepare(mine)  # a pass without gradient: routers keep numbers of the last one, and those of a graph cannot be copied
    engine.models = in_double(engine.models, grid)
    named: Any = [(name, parameter) for name, parameter, _ in named_parameters(engine.models, grid)]
    placements = place(engine.models, named, grid, hooks=engine.recipe.parallel.reduce_in_backward)
    engine.chunks = wrap_data_parallel(engine.models, engine.models[0].config, use_distributed_optimizer=False, grad_reduce_in_fp32=False)
    attach(engine.chunks, placements, grid)
    counts = denominators(mine, objective.count, 0, grid)

    def forward_step(chunk: Any, batch: Any) -> Any:
        return scored_logprobs(chunk, batch, grid), lambda output: scalar_and_sums(objective.loss(output, batch), [], counts, 0.0, len(mine), grid)

    with kept_in_double():
        objective.prepare(mine)
        forward_backward(engine.chunks, mine, forward_step, grid=grid, tokens_per_microbatch=len(mine[0].tokens))
    return {name: full.clone() for name, full in stream_full(engine.chunks, grid, value=_main_grad)}

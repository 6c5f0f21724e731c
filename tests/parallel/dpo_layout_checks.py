"""DPO's loss, metrics and gradients of two pairs a microbatch on any layout, for comparison with one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from megalign.batch import Batch, collate
from megalign.config.schema import Recipe
from megalign.data.rows import Example

VOCAB, PAIR, MULTIPLE = 120, 64, 4


def microbatches(count: int, share: bool) -> list[Batch]:
    """Pairs with a prompt in common, answers of different lengths, weights, and given log-probs of a reference.

    The last microbatch holds one pair and padding. Values are those that the data set gives.
    """
    numbers = np.random.default_rng(7)
    batches = []
    for number in range(count):
        packs = []
        for pair in range(2):
            prompt, weight = numbers.integers(0, VOCAB, numbers.integers(4, 10)), 1.0 if pair else 0.25
            documents = []
            for _ in range(2):
                answer = numbers.integers(0, VOCAB, numbers.integers(3, 18))
                ids = np.concatenate([prompt, answer]).astype(np.int32)
                mask = np.arange(len(ids)) >= len(prompt)
                values = {"weight": weight, "row": float(2 * number + pair), "ref_logprob": -4.0 * len(answer) - float(numbers.random())}
                documents.append(Example(ids, mask, values=values, shared=(len(prompt) - 1) * len(documents)))
            packs.append(documents if pair == 0 or number + 1 < count else [])
        batches.append(collate(packs, sequence_length=PAIR, pad_id=0, document_multiple=1 if share else MULTIPLE, share=share))
    return batches


def steps(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`step` of several recipes, one after the other in one launch."""
    return [step(case) for case in cases]


def _main_grad(parameter: Any) -> torch.Tensor:
    return parameter.main_grad


def step(case: dict[str, Any]) -> dict[str, Any]:
    """Means, full gradients in FP32 and in FP64, and the reference's log-probs of a model of its own, before any update."""
    import os

    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

    from megalign.dpo import pair_loss, pair_weight
    from megalign.models.forward import scored_logprobs
    from megalign.models.sequences import sequence_logprobs
    from megalign.models.weights import named_parameters, stream_full
    from megalign.parallel.audit.probe import in_double, kept_in_double
    from megalign.parallel.grid import destroy_grid
    from megalign.parallel.init import read_world
    from megalign.parallel.optimizer import wrap_data_parallel, zero_gradients
    from megalign.parallel.placement import place
    from megalign.parallel.reduction import attach
    from megalign.parallel.schedule import forward_backward
    from megalign.trainer.batches import shares_prompts
    from megalign.trainer.engine import Engine
    from megalign.trainer.objective import Objective, denominators, scalar_and_sums
    from megalign.trainer.reference import ReferenceModel
    from megalign.trainer.run import grid_of

    get_moe_layer_wise_logging_tracker().clear()
    recipe = Recipe.model_validate(case)
    grid = grid_of(recipe, read_world(os.environ))
    reference = ReferenceModel(recipe, grid, VOCAB)
    engine = Engine(recipe, grid, VOCAB)
    everything = microbatches(4, shares_prompts(recipe, grid))
    share = len(everything) // grid.data.size
    mine = everything[grid.data.rank * share : (grid.data.rank + 1) * share]
    zero_gradients(engine.chunks, engine.optimizer)
    sums, _ = engine._run(mine, Objective(pair_loss(recipe, grid), count=pair_weight), forward_only=False)
    grads = {name: full.clone() for name, full in stream_full(engine.chunks, grid, value=_main_grad)}

    policy = engine.score(mine, lambda output, batch: sequence_logprobs(output, batch, grid))
    given = [batch.values["ref_logprob"].clone() for batch in mine]
    reference.prepare(mine)
    same = all(torch.equal(found.double(), batch.values["ref_logprob"]) for found, batch in zip(policy, mine))
    other = not grid.is_last_stage or all(not torch.equal(batch.values["ref_logprob"], old) for batch, old in zip(mine, given))

    engine.models = in_double(engine.models, grid)
    named: Any = [(name, parameter) for name, parameter, _ in named_parameters(engine.models, grid)]
    placements = place(engine.models, named, grid, hooks=recipe.parallel.reduce_in_backward)
    engine.chunks = wrap_data_parallel(engine.models, engine.models[0].config, use_distributed_optimizer=False, grad_reduce_in_fp32=False)
    attach(engine.chunks, placements, grid)
    for batch, old in zip(mine, given):
        batch.values["ref_logprob"] = old
    counts, loss = denominators(mine, pair_weight, 0, grid), pair_loss(recipe, grid)

    def forward_step(chunk: Any, batch: Batch) -> Any:
        return scored_logprobs(chunk, batch, grid), lambda output: scalar_and_sums(loss(output, batch), [], counts, 0.0, len(mine), grid)

    with kept_in_double():
        forward_backward(engine.chunks, mine, forward_step, grid=grid, tokens_per_microbatch=len(mine[0].tokens))
    double = {name: full.clone() for name, full in stream_full(engine.chunks, grid, value=_main_grad)}
    destroy_grid()
    return {"means": sums.means(), "count": sums.count, "grads": grads, "double": double, "policy_is_reference": same and other}

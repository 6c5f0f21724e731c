"""Errors of a schedule, of a denominator, or from step to step: each shows in a whole run, whatever the layer; for test_upstream_bugs.py."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

from torch import Tensor
from upstream_bugs import PP2, SHAPE


def _worst_of(run: Any, expected: dict[str, Tensor]) -> float:
    from cell_checks import gradient_errors

    run.backward()
    return max(ratio for _, ratio in gradient_errors(run, expected))


def _interleaved(**config: bool) -> Callable[[Any], None]:
    def change(run: Any) -> None:
        for chunk in run.chunks:
            for name, value in config.items():
                setattr(chunk.module.config, name, value)

    return change


def _second_step(run: Any, forgotten: str) -> None:
    """A step (of size 0) whose gradients stay, because one of the two zeroings is left out of the next."""
    from megalign.parallel import optimizer

    optimizer.set_learning_rate(run.optimizer, 0.0)
    run.step()
    zero = {
        "buffers": lambda chunks, optimizer: optimizer.zero_grad(),
        "parameters": lambda chunks, optimizer: [chunk.zero_grad_buffer() for chunk in chunks],
    }
    optimizer.zero_gradients = zero[forgotten]  # this process is a fork of its own


def _scaled_by_data_alone(run: Any) -> None:
    """As if context ranks were data ranks: loss * (microbatches * DP * CP), though the schedule multiplies by CP itself (schedules.py:265)."""
    from megalign.trainer import objective

    def rescale(loss_sum: Tensor, global_tokens: Any, num_microbatches: int, grid: Any) -> Tensor:
        return loss_sum * (num_microbatches * grid.data_context.size / global_tokens)

    objective.rescale_for_megatron = rescale


def _means_of_each_context_rank(run: Any) -> None:
    """Each context rank divides by its own tokens, and DDP takes the mean (Megatron-LM 7452, finding 9: schedules.py, a loss of three values)."""
    from megalign.trainer import objective

    original = objective.scalar_and_sums

    def scalar_and_sums(loss: Any, ahead: Any, counts: Any, scale: float, num_microbatches: int, grid: Any) -> Any:
        right, sums = original(loss, ahead, counts, scale, num_microbatches, grid)
        main = objective.rescale_for_megatron(loss.sum, counts.count, num_microbatches, grid)
        return right - main + loss.sum / max(1.0, float(loss.count)) / grid.context.size, sums

    objective.scalar_and_sums = scalar_and_sums


def _predictions_counted_by_each_rank(run: Any) -> None:
    """The loss of prediction modules divided by the tokens of this rank (Megatron-LM 7452, finding 3: process_mtp_loss)."""
    from megalign.batch import look_ahead
    from megalign.trainer import objective

    upstream = objective.denominators

    def denominators(microbatches: Any, count: Any, depths: int, grid: Any) -> Any:
        counts = upstream(microbatches, count, depths, grid)
        mine = [sum(int(look_ahead(batch, k + 1).loss_mask.sum()) for batch in microbatches) for k in range(depths)]
        return objective.Denominators(counts.count, counts.tokens, [float(count) * grid.data.size for count in mine])

    objective.denominators = denominators


FOUR_LAYERS = {**SHAPE, "num_layers": 4, "mtp_num_layers": 1}
INTERLEAVED = {**PP2, "virtual_pipeline_model_parallel_size": 2}
SCHEDULES: dict[str, tuple[dict[str, Any], int, Callable[[Any], None]]] = {
    "batched communication of virtual stages": (INTERLEAVED, 1, _interleaved(batch_p2p_comm=True)),
    "outputs of virtual stages freed while they are sent": (
        INTERLEAVED, 1, _interleaved(batch_p2p_comm=False, overlap_p2p_comm=True, deallocate_pipeline_outputs=True)),
    "context ranks taken for data ranks": (dict(context_parallel_size=2), 4, _scaled_by_data_alone),
    "context ranks divide by their own tokens": (dict(context_parallel_size=2), 4, _means_of_each_context_rank),
    "prediction modules' tokens counted by each rank": (dict(), 1, _predictions_counted_by_each_rank),
    "gradient buffers not zeroed": (dict(), 1, lambda run: _second_step(run, "buffers")),
    "gradients of parameters not zeroed": (dict(), 1, lambda run: _second_step(run, "parameters")),
}  # fmt: skip


def schedule_oracle(multiple: int) -> dict[str, Tensor]:
    from cell_checks import _parameters
    from layout_checks import Run

    run = Run(FOUR_LAYERS, {}, distributed=False, document_multiple=multiple)
    run.backward()
    return {name: parameter.main_grad.clone() for name, parameter, _ in _parameters(run)}


def schedule_error(name: str, pickled: bytes) -> tuple[float, float]:
    """(with the defect, without): largest gradient error on this rank, in units of the tolerance."""
    from cell_checks import _forget
    from layout_checks import Run

    layout, multiple, defect = SCHEDULES[name]
    expected = pickle.loads(pickled)
    right = _worst_of(Run(FOUR_LAYERS, layout, distributed=False, document_multiple=multiple), expected)
    _forget()
    run = Run(FOUR_LAYERS, layout, distributed=False, document_multiple=multiple)
    defect(run)
    return _worst_of(run, expected), right

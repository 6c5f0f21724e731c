"""Bytes of the collectives of a real training step, counted at torch.distributed's door."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.distributed as dist
from memory_checks import rows

from megalign.config.schema import Recipe


def count(cases: list[tuple[dict[str, Any], int]]) -> list[dict[str, Any]]:
    """One step of each (recipe, vocabulary): {"stage": n, "sent": {"axis operation": payload bytes}} on this rank."""
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

    from megalign.config.layout import layout_of
    from megalign.config.rules import check
    from megalign.parallel.grid import destroy_grid
    from megalign.sft import token_loss
    from megalign.trainer.engine import Engine
    from megalign.trainer.objective import Objective
    from megalign.trainer.run import grid_of

    counter = _Counter()
    found = []
    for given, vocabulary in cases:
        get_moe_layer_wise_logging_tracker().clear()
        recipe = Recipe.model_validate(given)
        check(recipe, dist.get_world_size())
        grid: Any = grid_of(recipe, None)  # pyright: ignore[reportArgumentType]
        engine = Engine(recipe, grid, vocabulary)
        layout = layout_of(recipe, dist.get_world_size())
        batches = rows(recipe, layout.microbatches, vocabulary)
        counter.axes = _axes(grid)
        counter.sent = {}
        engine.train_step(batches, Objective(token_loss), 1e-4, 1)
        found.append({"stage": grid.pipeline.rank, "sent": counter.sent})
        counter.sent = {}
        destroy_grid()
    return found


def _axes(grid: Any) -> dict[int, str]:
    """Group -> axis, by identity: two groups of the same ranks are different axes."""
    groups = grid.process_groups
    named = {
        "tensor": grid.tensor.group, "pipeline": grid.pipeline.group, "context": grid.context.group,
        "data": grid.data_context.group, "expert_data": grid.expert_data.group, "expert": grid.expert.group,
        "expert_tensor": grid.expert_tensor.group,
    }  # fmt: skip
    axes = {id(group): axis for axis, group in named.items()}
    for name in ("embd", "dp_cp", "expt_dp", "tp_ep"):
        group = getattr(groups, name, None)
        axes.setdefault(id(group), {"embd": "pipeline", "dp_cp": "data", "expt_dp": "expert_data", "tp_ep": "expert"}[name])
    return axes


class _Counter:
    """Stands before every collective that megatron and megalign call."""

    def __init__(self) -> None:
        self.axes: dict[int, str] = {}
        self.sent: dict[str, int] = {}
        for names, operation, measured in (
            (("all_reduce",), "all_reduce", 0),
            (("all_gather_into_tensor", "_all_gather_base"), "all_gather", 0),
            (("reduce_scatter_tensor", "_reduce_scatter_base"), "reduce_scatter", 1),
            (("all_to_all_single",), "all_to_all", 1),
            (("isend",), "send", 0),
        ):
            for name in names:
                self._stand_before(name, operation, measured)
        self._batches()

    def _stand_before(self, name: str, operation: str, measured: int) -> None:
        plain = getattr(dist, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            tensor = args[measured] if len(args) > measured else kwargs[("output_tensor", "input_tensor")[measured] if operation != "all_reduce" else "tensor"]
            self._count(operation, tensor, kwargs.get("group", next((a for a in args if isinstance(a, dist.ProcessGroup)), None)))
            return plain(*args, **kwargs)

        if name != "isend":  # torch compares the op of a batch with its own function
            setattr(dist, name, counted)
        for module in ("tensor_parallel.mappings", "tensor_parallel.layers", "tensor_parallel.utils", "distributed.param_and_grad_buffer",
                       "pipeline_parallel.p2p_communication", "transformer.moe.moe_utils", "tensor_parallel.random"):  # fmt: skip
            loaded = importlib.import_module(f"megatron.core.{module}")
            for attribute, value in list(vars(loaded).items()):
                if plain in (value, getattr(value, "__wrapped__", None)):  # the patch lone-reduction wraps one
                    setattr(loaded, attribute, counted)

    def _batches(self) -> None:
        from megatron.core.pipeline_parallel import p2p_communication

        plain, ops = dist.batch_isend_irecv, p2p_communication._p2p_ops

        def batch(operations: list[Any]) -> Any:
            for operation in operations:
                if operation.op is dist.isend:
                    self._count("send", operation.tensor, operation.group)
            return plain(operations)

        def one_by_one(**kwargs: Any) -> Any:
            for name in ("tensor_send_next", "tensor_send_prev"):
                if kwargs[name] is not None:
                    self._count("send", kwargs[name], kwargs["group"])
            return ops(**kwargs)

        dist.batch_isend_irecv = batch
        p2p_communication._p2p_ops = one_by_one

    def _count(self, operation: str, tensor: torch.Tensor, group: Any) -> None:
        axis = self.axes.get(id(group), "world")
        if group is not None and group.size() == 1:
            return
        key = f"{axis} {operation}"
        self.sent[key] = self.sent.get(key, 0) + tensor.numel() * tensor.element_size()

"""What the routers did: load of each expert, dropped tokens, auxiliary losses; equal on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalign.parallel.grid import Grid
from megalign.parallel.init import device


class ExpertWatch:
    """Counts assignments of real tokens at every router of this rank while `counting`; `collect` sums them over the grid."""

    def __init__(self, models: Sequence[Any], grid: Grid):
        self.grid = grid
        self.counting = False
        routers = [m for model in models for m in model.modules() if type(m).__name__ == "TopKRouter"]
        self.config = models[0].config
        self.counts: list[tuple[int, Tensor]] = []  # (layer number, [E])
        self.expected = 0
        for router in routers:
            counts = torch.zeros(self.config.num_moe_experts, dtype=torch.float64, device=device())
            self.counts.append((router.layer_number - 1, counts))
            router.register_forward_hook(self._hook(counts))

    def _hook(self, counts: Tensor) -> Any:
        from megatron.core.tensor_parallel.random import is_checkpointing

        def count(module: Any, inputs: Any, output: Any) -> None:
            # A recomputed layer routes twice: first without gradient, then, in backward, with it.
            again = is_checkpointing() and torch.is_grad_enabled()
            if self.counting and not again:
                routing_map = output[1]  # [tokens, E] bool
                if len(inputs) > 1 and inputs[1] is not None:
                    routing_map = routing_map[~inputs[1].reshape(-1)]
                counts.add_(routing_map.sum(0))
                self.expected += routing_map.shape[0] * self.config.moe_router_topk

        return count

    def start(self) -> None:
        """Begin to count at the next forward."""
        self.counting, self.expected = True, 0
        for _, counts in self.counts:
            counts.zero_()

    def collect(self) -> dict[str, Any]:
        """Stop counting: {"expert_load": [[share an expert] a layer with experts], "expert_layers": their numbers
        from 0 (prediction modules behind the last), "dropped_tokens": assignments lost to capacity}."""
        self.counting = False
        if self.config.num_moe_experts is None:
            return {}
        mine = {}
        expected = torch.tensor(float(self.expected), dtype=torch.float64, device=device())
        for layer, counts in self.counts:
            total = counts.clone()
            for group in self._groups_of_tokens():
                dist.all_reduce(total, group=group)
            mine[layer] = total.tolist()
        for group in self._groups_of_tokens():
            dist.all_reduce(expected, group=group)
        stages: list[Any] = [None] * self.grid.pipeline.size
        dist.all_gather_object(stages, (mine, expected.item()), group=self.grid.pipeline.group)
        layers = {layer: counts for counts_of, _ in stages for layer, counts in counts_of.items()}
        kept = sum(sum(counts) for counts in layers.values())
        dropped = int(sum(count for _, count in stages) - kept)
        load = [[count / max(1.0, sum(layers[layer])) for count in layers[layer]] for layer in sorted(layers)]
        return {"expert_load": load, "expert_layers": sorted(layers), "dropped_tokens": dropped}

    def _groups_of_tokens(self) -> list[Any]:
        """Groups over which each rank routes tokens of its own."""
        groups = [self.grid.data_context.group]
        return [*groups, self.grid.tensor.group] if self.config.sequence_parallel else groups

    def auxiliary_losses(self, microbatches: int) -> dict[str, float]:
        """Mean over layers and microbatches of the auxiliary losses since the last call, without coefficients."""
        from megatron.core.transformer.moe.moe_utils import track_moe_metrics

        config = self.config
        used = {"load_balancing_loss": config.moe_aux_loss_coeff, "z_loss": config.moe_z_loss_coeff}
        names = [name for name, coefficient in used.items() if coefficient]
        if config.num_moe_experts is None or not names:
            return {}
        found: dict[str, Tensor] = {}
        track_moe_metrics(
            1 / microbatches,
            0,
            None,
            total_loss_dict=found,
            force_initialize=True,  # a stage without this loss must still take part in the reduction
            track_names=names,
            num_layers=config.num_layers + (config.mtp_num_layers or 0),
            moe_layer_freq=config.moe_layer_freq,
            mtp_num_layers=config.mtp_num_layers if config.moe_layer_freq[-1] else None,
            pg_collection=self.grid.process_groups,
        )
        return {name: float(found[name]) for name in names}

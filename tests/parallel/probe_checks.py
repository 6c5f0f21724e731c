"""The probe on small engines, sound or with a fault on which all copies agree; for test_audit_probe.py."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

SMALL = dict(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, qk_layernorm=True, vocab_size=120,
    num_moe_experts=4, moe_ffn_hidden_size=24, moe_shared_expert_intermediate_size=16, moe_aux_loss_coeff=0.01, init_method_std=0.1,
)  # fmt: skip
LEARNED = dict(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, normalization="LayerNorm", activation_func="gelu_tanh",
    gated_linear_unit=False, add_bias_linear=True, position_embedding_type="learned_absolute", share_embeddings_and_output_weights=True,
    vocab_size=120, init_method_std=0.1,
)  # fmt: skip
LATENT = dict(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, multi_latent_attention=True, q_lora_rank=12, kv_lora_rank=10,
    qk_head_dim=6, qk_pos_emb_head_dim=4, v_head_dim=5, num_moe_experts=4, moe_ffn_hidden_size=24, moe_router_score_function="sigmoid",
    moe_router_enable_expert_bias=True, vocab_size=120, init_method_std=0.1,
)  # fmt: skip

SMALL_GAIN = 0.02  # of a parameter whose gradient is less than a hundredth of the largest one's beside it


def probed(fault: str | None, model: dict[str, Any], parallel: dict[str, Any], train: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(kind of parameter, cause, group) of everything the probe finds."""
    from megalign.config.schema import Recipe
    from megalign.parallel.grid import destroy_grid
    from megalign.parallel.init import read_world
    from megalign.trainer.engine import Engine
    from megalign.trainer.probing import probe_engine
    from megalign.trainer.run import grid_of

    size = parallel.get("pipeline_model_parallel_size", 1) * 4 * dist.get_world_size()
    recipe = Recipe.model_validate({"model": model, "parallel": parallel, "train": {"global_batch_size": size, **train}})
    engine = Engine(recipe, grid_of(recipe, read_world(os.environ)), 120)
    undo = _inject(fault, engine)
    found = probe_engine(engine, 120)
    undo()
    destroy_grid()
    return [(finding.parameter, finding.cause, finding.group) for finding in found]


def _inject(fault: str | None, engine: Any) -> Any:
    from megalign.parallel import reduction
    from megalign.parallel.placement import declare
    from megalign.trainer import objective

    said: Any = {"mean for sum": ("mlp.router.weight", "duplicated"), "sum for full": ("position_embeddings.weight", "partial")}.get(fault or "")
    if said is not None:
        for p in engine.placements:
            if p.name.endswith(said[0]):
                declare(p.parameter, tensor=said[1])
    if fault == "small lost factor":
        final = next(m for m in engine.models[0].modules() if m is getattr(engine.models[0].decoder, "final_layernorm", None))
        final.gain = torch.nn.Parameter(torch.zeros(final.weight.shape))

        def forward(module: Any, inputs: Any, output: Any) -> Any:
            return output * (1 + SMALL_GAIN * (module.gain / 2 + module.gain.detach() / 2))

        final.register_forward_hook(forward)
    if fault == "lost factor":
        original = objective.rescale_for_megatron
        objective.rescale_for_megatron = lambda *arguments: original(*arguments) / 2
        return lambda: setattr(objective, "rescale_for_megatron", original)
    if fault == "reduced twice":
        whole = reduction.Bucket.finish

        def twice(self: Any) -> None:
            whole(self)
            for parameter in self.parameters:
                dist.all_reduce(parameter.main_grad, group=self.group)

        reduction.Bucket.finish = twice
        return lambda: setattr(reduction.Bucket, "finish", whole)
    if fault == "one rank's part":
        send = reduction.Bucket.send

        def broadcast(self: Any) -> None:
            self.flat = torch.cat([p.main_grad.reshape(-1) for p in self.parameters])
            self.work = dist.broadcast(self.flat, src=dist.get_process_group_ranks(self.group)[0], group=self.group, async_op=True)

        reduction.Bucket.send = broadcast
        return lambda: setattr(reduction.Bucket, "send", send)
    return lambda: None


def sweep(cases: list[Any]) -> list[Any]:
    """`probed` of several cases in one launch."""
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

    found = []
    for case in cases:
        get_moe_layer_wise_logging_tracker().clear()
        found.append(probed(*case))
    return found

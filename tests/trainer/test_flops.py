"""The plan's FLOPs and operations against torch's own count of a real forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from memory_checks import rows
from packaging.version import Version
from ranks import run_ranks
from test_memory import DENSE, LATENT, MOE, UNIFORM, VOCABULARY, case, selective

from megalign.config.layout import layout_of, padded_vocab
from megalign.config.predict import microbatch_flops, operations, step_operations
from megalign.config.schema import Recipe
from megalign.config.size import count_parameters
from megalign.trainer.mfu import flops_per_token

CASES = [case(DENSE, {}), case({**DENSE, "share_embeddings_and_output_weights": True}, {}), case(MOE, {}), case(DENSE, {}, **UNIFORM),
         case(DENSE, {}, **selective("mlp")), case(MOE, {}, **selective("moe"))]  # fmt: skip


def count(cases: list) -> list[tuple[float, int]]:
    """FLOPs and dispatched operations of one step of each recipe."""
    from torch.utils.flop_counter import FlopCounterMode

    from megalign.parallel.grid import destroy_grid
    from megalign.sft import token_loss
    from megalign.trainer.engine import Engine
    from megalign.trainer.objective import Objective
    from megalign.trainer.peaks import _Count
    from megalign.trainer.run import grid_of

    found = []
    for given in cases:
        recipe = Recipe.model_validate(given)
        engine = Engine(recipe, grid_of(recipe, None), VOCABULARY)  # pyright: ignore[reportArgumentType]
        batches = rows(recipe, layout_of(recipe, 1).microbatches, VOCABULARY)
        with FlopCounterMode(display=False, custom_mapping=_unknown_to_torch(torch.ops.aten)) as counter:
            engine.train_step(batches, Objective(token_loss), 1e-4, 1)
        with _Count() as counted:
            engine.train_step(batches, Objective(token_loss), 1e-4, 2)
        found.append((float(counter.get_total_flops()), counted.operations))
        destroy_grid()
    return found


def _unknown_to_torch(aten: Any) -> dict[Any, Any]:
    """Operations of the CPU that torch's table lacks. Attention: scores and values, 2 S^2 (K + V) a head, half of it causal."""

    def forward(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        batch, heads, length, size = query
        return batch * heads * length * key[2] * (size + value[3])

    def backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return 2 * forward(query, key, value)

    def addmm_(target: Any, left: Any, right: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return 2 * left[0] * left[1] * right[1]

    flash = "_scaled_dot_product_flash_attention_for_cpu"
    return {getattr(aten, flash): forward, getattr(aten, flash + "_backward"): backward, aten.addmm_: addmm_}


def test_planned_flops_are_counted_flops():
    """Within 1 %: norms and routers are counted as matmuls. Documents of 128 tokens. Operations within 10 %, of torch 2.13 and
    later: what a checkpointed block dispatches is torch's affair (2.9.1: 14 % more), and the plan counts the newer one's."""
    for given, (counted, dispatched) in zip(CASES, run_ranks(count, 1, CASES)[0], strict=True):
        recipe = Recipe.model_validate(given)
        layout = layout_of(recipe, 1)
        tokens = recipe.data.sequence_length
        planned = layout.microbatches * microbatch_flops(recipe, layout, padded_vocab(VOCABULARY, 1), 0, tokens, (tokens - 2) / tokens, attended=128)
        assert abs(planned / counted - 1) < 0.01, (given["train"], planned / counted)
        expected = layout.microbatches * operations(recipe, layout, 0) + step_operations(recipe, layout, 0)
        if Version(torch.__version__) >= Version("2.13"):
            assert abs(expected / dispatched - 1) < 0.1, (given, expected / dispatched)


def test_mfu_counts_what_torch_counts():
    """MLA's two head sizes, experts behind a dense layer, prediction modules. Attention here has no fused kernel, so torch
    counts all scores, as MFU does by convention. Within 1 %: norms and routers, and the few tokens that are not scored."""
    experts = {"num_moe_experts": 4, "moe_ffn_hidden_size": 96, "moe_layer_freq": [0, 1, 1, 1], "moe_shared_expert_intermediate_size": 64}
    cases = [case({**LATENT, **more}, {}) for more in ({}, {"q_lora_rank": None, **experts}, {**experts, "mtp_num_layers": 2})]
    for given, (counted, _) in zip(cases, run_ranks(count, 1, cases)[0], strict=True):
        recipe = Recipe.model_validate(given)
        tokens = recipe.data.sequence_length * recipe.train.global_batch_size
        statistics = {"rows_kept": 2, "tokens": 256, "sequence_length": 256}  # documents of 128 tokens
        predicted = flops_per_token(recipe.model, count_parameters(recipe.model, padded_vocab(VOCABULARY, 1)), statistics)
        assert abs(predicted * tokens / counted - 1) < 0.01, (given["model"], predicted * tokens / counted)

"""The rules against megatron-core itself: what it refuses we refuse, and what we add is named here."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.attention import divide
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch.testing._internal.distributed.fake_pg import FakeStore

from megalign.config.errors import ConfigError
from megalign.config.layout import expert_tensor_parallel_size, layout_of
from megalign.config.memory import stage_numbers
from megalign.config.rules import check
from megalign.config.schema import Recipe
from megalign.config.stages import stage_layers, unrolled


def refused(model: dict, parallel: dict, world: int | None = None) -> set[str]:
    """Fields that our rules refuse (batch and sequence are chosen so that everything divides them)."""
    recipe = Recipe.model_validate(
        {"model": model, "parallel": parallel, "train": {"global_batch_size": 720720}, "data": {"sequence_length": 5040}}
    )
    try:
        check(recipe, world)
    except ConfigError as error:
        return {problem.field for problem in error.problems}
    return set()


def megatron_config(model: dict, parallel: dict) -> TransformerConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TransformerConfig(
            **{key: value for key, value in model.items() if key != "moe_norm_topk_prob"},
            **parallel,
            moe_router_pre_softmax=not model.get("moe_norm_topk_prob", True),
            add_bias_linear=False,
            pipeline_dtype=torch.float32,
        )


def shapes() -> Iterator[tuple[dict, dict]]:
    for heads, groups, tp, sp in itertools.product((2, 4, 6, 12), (1, 2, 3, 4, 12), (1, 2, 3, 4), (False, True)):
        model = {"num_layers": 2, "hidden_size": 48 * heads, "num_attention_heads": heads, "num_query_groups": groups,
                 "ffn_hidden_size": 144, "kv_channels": 48}  # fmt: skip
        yield model, {"tensor_model_parallel_size": tp, "sequence_parallel": sp}


def experts() -> Iterator[tuple[dict, dict]]:
    for count, topk, norm, ep in itertools.product((None, 4), (1, 2), (False, True), (1, 2)):
        model = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 4, "ffn_hidden_size": 64,
                 "num_moe_experts": count, "moe_router_topk": topk, "moe_norm_topk_prob": norm,
                 "moe_ffn_hidden_size": 64}  # fmt: skip
        yield model, {"expert_model_parallel_size": ep}


def test_configurations_that_megatron_refuses():
    theirs = 0
    for model, parallel in [*shapes(), *experts()]:
        fields = refused(model, parallel)
        try:
            megatron_config(model, parallel)
            if model["num_query_groups"] < parallel.get("tensor_model_parallel_size", 1):
                divide(model["num_attention_heads"], model["num_query_groups"])  # as attention.py:294 does when built
        except (ValueError, AssertionError) as error:
            assert fields, f"megatron refuses {model} {parallel}: {error}"
            theirs += 1
        else:  # 4 heads in 3 groups: megatron fails in the first forward
            uneven = model["num_attention_heads"] % model["num_query_groups"]
            assert fields == ({"model.num_query_groups"} if uneven else set())
    assert theirs > 50


def test_pipelines_that_megatron_refuses():
    for layers, pp, vpp in itertools.product(range(1, 13), (1, 2, 3, 4), (None, 2, 3)):
        model = {"num_layers": layers, "hidden_size": 64, "num_attention_heads": 4}
        parallel = {"pipeline_model_parallel_size": pp, "virtual_pipeline_model_parallel_size": vpp}
        fields = refused(model, parallel)
        try:
            get_num_layers_to_build(megatron_config({**model, "ffn_hidden_size": 64}, parallel), vp_stage=0, pp_rank=0)
        except AssertionError:
            assert fields == {"model.num_layers"}
        else:  # vpp without pp: the layers divide, and megatron refuses it when it makes the groups
            assert fields == ({"parallel.virtual_pipeline_model_parallel_size"} if vpp and pp == 1 else set())


def uneven_pipelines() -> Iterator[tuple[int, int, int | None, dict[str, int]]]:
    counts = (None, 1, 2, 3, 4)
    for layers, pp, vpp, first, last in itertools.product((4, 5, 6, 8), (2, 3, 4), (None, 2), counts, counts):
        keys = {"num_layers_in_first_pipeline_stage": first, "num_layers_in_last_pipeline_stage": last}
        keys = {key: count for key, count in keys.items() if count is not None}
        if keys:
            yield layers, pp, vpp, keys


def test_uneven_pipelines_are_those_of_megatron():
    """What it refuses we refuse, and what we allow has its numbers of layers, chunk by chunk, and its offsets."""
    refusals = allowed = 0
    for layers, pp, vpp, keys in uneven_pipelines():
        model = {"num_layers": layers, "hidden_size": 64, "num_attention_heads": 4}
        parallel = {"pipeline_model_parallel_size": pp, "virtual_pipeline_model_parallel_size": vpp, **keys}
        fields = refused(model, parallel)
        recipe = Recipe.model_validate({"model": model, "parallel": parallel})
        try:
            config = megatron_config({**model, "ffn_hidden_size": 64}, parallel)
            theirs = [
                [(get_num_layers_to_build(config, chunk, stage), get_transformer_layer_offset(config, chunk, stage)) for chunk in range(vpp or 1)]
                for stage in range(pp)
            ]
        except (ValueError, AssertionError, ZeroDivisionError) as error:
            assert fields, f"megatron refuses {parallel} of {layers}: {error}"
            refusals += 1
            continue
        if min(count for stage in theirs for count, _ in stage) < 1:  # -1 layers: megatron would build none, and lose some
            assert fields, (layers, parallel)
            continue
        assert not fields, (layers, parallel, fields)
        layout = layout_of(recipe)
        assert stage_layers(recipe, layout) == [[count for count, _ in stage] for stage in theirs]
        firsts = [stage[0][1] for stage in theirs]
        assert [stage_numbers(recipe, layout, stage)[0] for stage in range(pp)] == firsts
        allowed += 1
    assert refusals > 50 and allowed > 20


@pytest.mark.parametrize("text", ["Ett|tt|t*2|tL", "E|(t|)*2ttttL", "E,t*3|(t,t|)*2,L", "Et|(tt|)*2ttL"])
def test_layout_strings_are_those_of_megatron(text):
    theirs = PipelineParallelLayerLayout.parse_str_to_list(text)
    assert [len(chunk) for chunk in unrolled(text)] == [len(chunk) for chunk in theirs]
    recipe = Recipe.model_validate({"model": {"num_layers": 7}, "parallel": {
        "pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": text}})  # fmt: skip
    layout = PipelineParallelLayerLayout(text, 2)
    counted = [[layout.layout[stage][chunk].count(LayerType.decoder) for chunk in range(2)] for stage in range(2)]
    assert stage_layers(recipe, layout_of(recipe)) == counted


@pytest.fixture
def ranks_of_a_world():
    """A function that makes megatron's groups on `world` pretended ranks (torch's fake process group)."""

    def create(world: int, parallel: dict, etp: int) -> None:
        dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
        try:
            parallel_state.initialize_model_parallel(
                **parallel, expert_tensor_parallel_size=etp, create_gloo_process_groups=False
            )
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()

    yield create
    parallel_state.destroy_model_parallel()


def test_layouts_that_megatron_refuses(ranks_of_a_world):
    model = {"num_layers": 12, "hidden_size": 144, "num_attention_heads": 12, "ffn_hidden_size": 144, "num_moe_experts": 12}
    refusals = 0
    for world, tp, pp, cp, ep, etp in itertools.product((4, 6, 8), (1, 2, 3), (1, 2), (1, 2), (1, 2, 3, 4), (None, 2)):
        parallel = {
            "tensor_model_parallel_size": tp,
            "pipeline_model_parallel_size": pp,
            "context_parallel_size": cp,
            "expert_model_parallel_size": ep,
        }
        keys = {**parallel, "expert_tensor_parallel_size": etp, "sequence_parallel": tp > 1}
        fields = refused(model, keys, world)
        effective = expert_tensor_parallel_size(Recipe.model_validate({"model": model, "parallel": keys}))
        try:
            ranks_of_a_world(world, parallel, effective)
        except RuntimeError:
            refusals += 1
            assert fields and fields <= {"parallel", "parallel.expert_model_parallel_size"}
        else:
            assert fields == set(), (world, keys)
    assert refusals > 50

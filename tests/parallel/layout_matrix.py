"""The layout matrix: a pairwise covering array over the axes of parallelism and the model families.

A `Cell` is one layout of one model. `space()` lists every cell that fits on eight ranks; `UNSUPPORTED` says which of
them cannot run, with the upstream line; `covering_array()` chooses few of the rest so that every pair of values of
two axes that occurs together at all occurs in the choice (greedy set cover: each time the cell with most new pairs
for its ranks).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

MAX_RANKS = 8
LAYERS = 4  # a stage needs one: pp 4 with two virtual stages has eight

_SHAPE = {"hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4}
_GROUPED = {**_SHAPE, "num_query_groups": 2}
_EXPERTS = {**_GROUPED, "qk_layernorm": True, "num_moe_experts": 4, "moe_ffn_hidden_size": 48}
_GPT2 = {
    "normalization": "LayerNorm", "activation_func": "gelu_tanh", "gated_linear_unit": False, "add_bias_linear": True,
    "position_embedding_type": "learned_absolute", "share_embeddings_and_output_weights": True,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "rotary_scaling_factor": 4.0, "original_max_position_embeddings": 16}
_LATENT = {
    "multi_latent_attention": True, "q_lora_rank": 24, "kv_lora_rank": 20, "qk_head_dim": 12, "qk_pos_emb_head_dim": 8,
    "v_head_dim": 10, "mscale_all_dim": 1.0,
}  # fmt: skip
_BIAS = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True, "moe_router_topk_scaling_factor": 2.5}
FAMILIES: dict[str, dict[str, Any]] = {
    "dense": _GROUPED,
    "biased": {**_GROUPED, **_YARN, "add_qkv_bias": True},
    "tied": {**_SHAPE, **_GPT2},  # and learned positions
    "alltoall": _EXPERTS,
    "allgather": {**_EXPERTS, "moe_token_dispatcher_type": "allgather"},
    "shared": {**_EXPERTS, "moe_shared_expert_intermediate_size": 32},
    "aux": {**_EXPERTS, "moe_aux_loss_coeff": 0.01, "moe_z_loss_coeff": 1e-3},
    "bias": {**_EXPERTS, **_BIAS},
    "mtp": {**_EXPERTS, "moe_shared_expert_intermediate_size": 32, "mtp_num_layers": 2},
    "dense mtp": {**_GROUPED, "mtp_num_layers": 1},
    "latent": {**_SHAPE, **_LATENT},
    "deepseek": {  # V3: latent attention, groups of experts, bias and a dense first layer
        **_SHAPE, **_LATENT, **_YARN, **_BIAS, "num_moe_experts": 8, "moe_ffn_hidden_size": 48, "moe_router_topk": 3,
        "moe_shared_expert_intermediate_size": 32, "moe_router_num_groups": 4, "moe_router_group_topk": 2, "moe_aux_loss_coeff": 0.01,
    },
}  # fmt: skip
DENSE = ("dense", "biased", "tied", "latent", "dense mtp")

AXES: dict[str, tuple[Any, ...]] = {
    "model": tuple(FAMILIES),
    "tp": (1, 2, 4),
    "sp": (False, True),
    "pp": (1, 2, 4),
    "vpp": (1, 2),
    "cp": (1, 2),
    "ep": (1, 2, 4),
    "etp": (1, 2),
    "dp": (1, 2, 4),
    "distributed": (False, True),
    "overlap": ("none", "gradients", "parameters", "gradients and parameters"),
    "accumulation": (1, 2, 4),
}


@dataclass(frozen=True)
class Cell:
    """One model on one layout. accumulation: microbatches of a data-parallel rank in a step."""

    model: str
    tp: int
    sp: bool
    pp: int
    vpp: int
    cp: int
    ep: int
    etp: int
    dp: int
    distributed: bool
    overlap: str
    accumulation: int

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def microbatches(self) -> int:
        """Of the global batch: what one process works through."""
        return self.dp * self.accumulation

    @property
    def document_multiple(self) -> int:
        return 2 * self.cp if self.cp > 1 else 1

    def model_config(self) -> dict[str, Any]:
        """Fields of ModelConfig."""
        layers = max(LAYERS, self.pp * self.vpp)
        shape = {"num_layers": layers, **FAMILIES[self.model]}
        if self.model == "deepseek":
            shape["moe_layer_freq"] = [0] + [1] * (layers - 1)
        return shape

    def layout(self) -> dict[str, Any]:
        """Keyword arguments of `create_grid`, and sequence_parallel."""
        return dict(
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            virtual_pipeline_model_parallel_size=self.vpp if self.vpp > 1 else None,
            context_parallel_size=self.cp,
            expert_model_parallel_size=self.ep,
            expert_tensor_parallel_size=self.etp if self.etp > 1 else None,
            sequence_parallel=self.sp,
        )

    def recipe(self) -> Any:
        """The same for the validator."""
        from megalign.config.schema import Recipe

        parallel = {
            **self.layout(),
            "data_parallel_size": self.dp,
            "use_distributed_optimizer": self.distributed,
            "overlap_grad_reduce": "gradients" in self.overlap,
            "overlap_param_gather": "parameters" in self.overlap,
        }
        return Recipe.model_validate(
            {
                "model": self.model_config(),
                "parallel": parallel,
                "train": {"global_batch_size": self.microbatches},
                "data": {"sequence_length": 720},
            }
        )

    def __str__(self) -> str:
        sizes = [f"{name}{getattr(self, name)}" for name in ("tp", "pp", "vpp", "cp", "ep", "etp", "dp") if getattr(self, name) > 1]
        words = ["sp"] * self.sp + ["distributed"] * self.distributed
        words += [] if self.overlap == "none" else ["overlap " + self.overlap]
        return " ".join([self.model, *sizes, *words, f"x{self.accumulation}"])


PLAIN = Cell("dense", 1, False, 1, 1, 1, 1, 1, 1, False, "none", 1)


@dataclass(frozen=True)
class Unsupported:
    """Cells that cannot run: `snippet` stands at `where` of megatron-core 0.16.1 (under megatron/core).

    example: a cell with this fault alone. symptom: how its run fails (regular expression); where it is silent instead,
    really: the supported cell that runs in its place.
    """

    name: str
    where: str
    snippet: str
    holds: Callable[[Cell], bool]
    example: Cell
    symptom: str = ""
    really: Cell | None = None


UNSUPPORTED = (
    Unsupported(
        "sequence parallel without tensor parallel", "model_parallel_config.py:411", "Cannot use sequence parallelism without tensor",
        lambda c: c.sp and c.tp == 1,
        replace(PLAIN, sp=True), "ValueError: Cannot use sequence parallelism without tensor parallelism"),
    Unsupported(
        "experts under tensor parallel without sequence parallel", "transformer/moe/moe_layer.py:379", "self.attn_tp_group.size() > 1 and not self.config.sequence_parallel",
        lambda c: c.model not in DENSE and c.tp > 1 and not c.sp,
        replace(PLAIN, model="alltoall", tp=2), "ValueError: During training, performance may degrade"),
    Unsupported(
        "expert parallel without experts", "transformer/transformer_config.py:1049", "num_moe_experts must be non None",
        lambda c: c.model in DENSE and c.ep > 1,
        replace(PLAIN, ep=2, dp=2), "ValueError: num_moe_experts must be non None"),
    Unsupported(
        "expert tensor parallel without experts", "model_parallel_config.py:413", "self.expert_tensor_parallel_size is None",
        lambda c: c.model in DENSE and c.etp > 1,
        replace(PLAIN, etp=2, dp=2), really=replace(PLAIN, dp=2)),
    Unsupported(
        "experts that do not fill the ranks", "parallel_state.py:792", "world_size % expert_tensor_model_pipeline_parallel_size",
        lambda c: c.model not in DENSE and c.world % (c.etp * c.ep * c.pp) > 0,
        replace(PLAIN, model="alltoall", ep=4, dp=2), "RuntimeError: world_size .* is not divisible by"),
    Unsupported(
        "interleaving without a pipeline", "parallel_state.py:746", "if not pipeline_model_parallel_size > 1",
        lambda c: c.vpp > 1 and c.pp == 1,
        replace(PLAIN, vpp=2, dp=2), "RuntimeError: pipeline-model-parallel size should be greater than 1"),
    Unsupported(
        "interleaving with a partial group of microbatches", "pipeline_parallel/schedules.py:996", "config.microbatch_group_size_per_vp_stage > num_microbatches",
        lambda c: c.vpp > 1 and c.pp > 1 and c.accumulation % c.pp > 0,
        replace(PLAIN, pp=2, vpp=2), "ValueError: The number of contiguous micro-batches in a virtual pipeline stage"),
    Unsupported(
        "overlapped gathering without the distributed optimizer", "distributed/distributed_data_parallel.py:348", "self.ddp_config.use_distributed_optimizer and",
        lambda c: "parameters" in c.overlap and not c.distributed,
        replace(PLAIN, dp=2, overlap="gradients and parameters"), really=replace(PLAIN, dp=2, overlap="gradients")),
)  # fmt: skip


def space() -> Iterator[Cell]:
    """Every cell that fits, supported or not."""
    for values in itertools.product(*AXES.values()):
        cell = Cell(*values)
        if cell.world <= MAX_RANKS:
            yield cell


def unsupported(cell: Cell) -> list[Unsupported]:
    """Why it cannot run; empty if it can."""
    return [reason for reason in UNSUPPORTED if reason.holds(cell)]


@functools.cache
def supported() -> list[Cell]:
    return [cell for cell in space() if not unsupported(cell)]


def pairs(cell: Cell) -> Iterator[tuple[tuple[str, Any], tuple[str, Any]]]:
    """Every pair of values of two axes in this cell."""
    return itertools.combinations(asdict(cell).items(), 2)


def pairs_of(cells: Iterable[Cell]) -> set[Any]:
    return {pair for cell in cells for pair in pairs(cell)}


def _cost(cell: Cell) -> float:
    """Seconds, roughly: processes, and microbatches that each works through."""
    return math.sqrt(cell.world) * (4 + cell.accumulation * (1 + (cell.pp * cell.vpp > LAYERS)))


@functools.cache
def short_array(count: int = 12, ranks: int = 4) -> list[Cell]:
    """`count` supported cells on few ranks in which every value of every axis occurs, and as many pairs as may be."""
    few = [cell for cell in supported() if 1 < cell.world <= ranks]
    return _cover(few, lambda cell: [*asdict(cell).items(), *pairs(cell)], most=count)


@functools.cache
def covering_array() -> list[Cell]:
    """The short array and more: every pair of values that any supported cell has occurs."""
    return _cover(supported(), pairs, short_array())


def chunks(cells: Sequence[Cell], size: int = 6) -> list[list[Cell]]:
    """Cells of one world size that share a launch."""
    ordered = sorted(cells, key=lambda cell: cell.world)
    worlds = [list(group) for _, group in itertools.groupby(ordered, key=lambda cell: cell.world)]
    return [group[i : i + size] for group in worlds for i in range(0, len(group), size)]


def _cover(
    cells: Sequence[Cell], parts: Callable[[Cell], Iterable[Any]], chosen: Sequence[Cell] = (), most: int = 1000
) -> list[Cell]:
    """Greedy set cover: `chosen`, and until every part of any cell occurs the cell with most new parts for its cost."""
    numbers: dict[Any, int] = {}
    rows = [[numbers.setdefault(part, len(numbers)) for part in parts(cell)] for cell in cells]
    has = np.zeros((len(cells), len(numbers)), dtype=np.float32)
    for row, columns in enumerate(rows):
        has[row, columns] = 1
    cheap = np.array([_cost(cell) for cell in cells]) ** -0.25
    # A value alone is (axis, value), a pair is two of them: a new value is worth many pairs.
    missing, chosen = np.array([1.0 if isinstance(part[0], tuple) else 50.0 for part in numbers], dtype=np.float32), list(chosen)
    missing[[numbers[part] for cell in chosen for part in parts(cell)]] = 0
    while missing.any() and len(chosen) < most:
        best = int(np.argmax((has @ missing) * cheap))
        chosen.append(cells[best])
        missing[rows[best]] = 0
    return chosen

"""The time of a training step, from what must be computed, moved and sent, and the device's peaks.

    step = (m + (pp - 1) / vpp) * slowest stage's microbatch + gradients and weights between replicas + optimizer

A microbatch costs its matmuls over the peak, five passes over the tensors that autograd would keep (written, read
forward, read backward, its gradient written and read) and three over weights, two over FP32 gradients, over the
memory's bandwidth, its collectives over their wires, and on a CPU its operations at what each costs besides arithmetic.
Nothing is assumed to overlap, no latency is counted, attention and small matmuls are taken to reach the peak: a lower
bound. `benchmarks/plan/run.py` draws it beside measured steps.

# T tokens of a microbatch on a rank, D hidden size, H heads, K and V sizes of key and value, S positions
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from megalign.config.activations import FP32, has_experts, head_sizes, layer_tensors, width_of
from megalign.config.communication import Traffic, traffic_of
from megalign.config.hardware import Device
from megalign.config.layout import Layout
from megalign.config.memory import ROWS, Algorithm, stage_numbers, stage_parameters, tables
from megalign.config.recompute import recomputed_modules
from megalign.config.schema import Recipe

PASSES = 5  # over a kept tensor; see above
# Operations that torch dispatches, views included, on one rank; fitted to counts of real steps (tests/trainer/test_flops.py).
OPERATIONS = {"dense": 258, "experts": 347, "expert": 38, "shared": 44, "qk_layernorm": 44, "rest": 154}  # a layer and microbatch
STEP_OPERATIONS = {"layer": 54, "expert": 16, "rest": 71}  # gradients and optimizer, once a step
ADAM_BYTES = {"fp32": 4 * 7, "bf16": 4 * 7 + 2}  # reads gradient, weight, both moments; writes weight, both moments (and BF16)

HOST_LINK = 64e9  # bytes a second one way between a device and its host: PCIe 5.0, 16 lanes


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step of the rank that is slowest."""

    total: float
    matmul: float  # a microbatch, like the next three
    memory: float
    communication: float
    launches: float
    microbatches: int
    bubble: float  # microbatches' time that the pipeline waits
    replicas: float
    optimizer: float
    flops: float  # of a microbatch on this rank
    stage: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def step_time(
    recipe: Recipe, layout: Layout, rows: int, device: Device, *, algorithm: Algorithm = "sft", scored: float = 1.0, attended: float | None = None
) -> StepTime:
    """Predicted seconds of a policy's training step (rollouts, and passes of frozen models, are not in it).

    rows: padded vocabulary. attended: mean document length, where rows are packed; default: the sequence length.
    """
    stages = [0, layout.pp - 1] if layout.pp > 2 else range(layout.pp)
    if layout.pp > 2:
        middle = max(range(1, layout.pp - 1), key=lambda stage: len(stage_numbers(recipe, layout, stage)))
        stages = [0, middle, layout.pp - 1]
    return max((_stage(recipe, layout, rows, device, stage, ROWS.get(algorithm, 1), scored, attended) for stage in stages), key=lambda time: time.total)


def _stage(recipe: Recipe, layout: Layout, rows: int, device: Device, stage: int, rows_a_microbatch: int, scored: float, attended: float | None) -> StepTime:
    tokens = recipe.train.micro_batch_size * rows_a_microbatch * recipe.data.sequence_length // layout.cp
    flops = microbatch_flops(recipe, layout, rows, stage, tokens, scored, attended)
    dense, experts = stage_parameters(recipe, layout, rows, stage)
    like: dict[bool, list[int]] = {}
    for number in stage_numbers(recipe, layout, stage):
        like.setdefault(has_experts(recipe.model, number), []).append(number)
    moved = tokens * sum(
        len(numbers) * tensor.bytes for numbers in like.values() for tensor in layer_tensors(recipe, layout, numbers[0], device.kind)
    )
    moved = PASSES * moved + (dense + experts) * (3 * width_of(recipe) + 2 * FP32)
    m = layout.microbatches
    traffic = traffic_of(recipe, layout, rows, stage, rows_a_microbatch=rows_a_microbatch, scored=scored)
    between = sum(seconds(part, layout, device) for part in traffic if _once_a_step(part))
    inside = sum(seconds(part, layout, device) for part in traffic if not _once_a_step(part)) / m
    matmul = flops / (device.flops(recipe.train.precision) * device.matmul_share)
    memory = moved / device.memory_bandwidth
    launches = device.launch * operations(recipe, layout, stage)
    once = device.launch * step_operations(recipe, layout, stage)
    bubble = (layout.pp - 1) / layout.vpp
    sharded = recipe.parallel.use_distributed_optimizer
    owned = dense // (layout.dp * layout.cp) + experts // layout.expert_dp if sharded else dense + experts
    if recipe.optimizer.optimizer_cpu_offload:  # gradients down, weights up; the update itself is the host's, and not predicted
        optimizer = owned * (FP32 + width_of(recipe)) / HOST_LINK + once
    else:
        optimizer = owned * ADAM_BYTES[recipe.train.precision] / device.memory_bandwidth + once
    total = (m + bubble) * (matmul + memory + inside + launches) + between + optimizer
    return StepTime(total, matmul, memory, inside, launches, m, bubble, between, optimizer, flops, stage)


def operations(recipe: Recipe, layout: Layout, stage: int) -> float:
    """Operations dispatched for a microbatch, forward and backward; what is recomputed runs its forward, a third, again."""
    model, modules = recipe.model, recomputed_modules(recipe)
    total = 0.0
    for number in stage_numbers(recipe, layout, stage):
        layer = OPERATIONS["qk_layernorm"] * model.qk_layernorm
        if has_experts(model, number):
            layer += OPERATIONS["experts"] + OPERATIONS["expert"] * (model.num_moe_experts or 0) / layout.ep
            layer += OPERATIONS["shared"] * bool(model.moe_shared_expert_intermediate_size)
        else:
            layer += OPERATIONS["dense"]
        total += layer * (4 / 3 if recipe.train.recompute_granularity == "full" else 6 / 5 if "moe" in modules else 1)
    return total + OPERATIONS["rest"]


def step_operations(recipe: Recipe, layout: Layout, stage: int) -> float:
    """Operations dispatched once a step."""
    numbers = stage_numbers(recipe, layout, stage)
    experts = sum(has_experts(recipe.model, number) for number in numbers) * (recipe.model.num_moe_experts or 0) / layout.ep
    return STEP_OPERATIONS["rest"] + STEP_OPERATIONS["layer"] * len(numbers) + STEP_OPERATIONS["expert"] * experts


def microbatch_flops(recipe: Recipe, layout: Layout, rows: int, stage: int, tokens: int, scored: float = 1.0, attended: float | None = None) -> float:
    """FLOPs of forward and backward on one rank: 2 a weight and token forward, twice that backward, and what is
    recomputed once more; scores and values of causal attention, half of S each: 2 H (K + V) S / 2 a token."""
    model, tp = recipe.model, layout.tp
    heads, _, key, value = head_sizes(model)
    numbers = stage_numbers(recipe, layout, stage)
    train, modules = recipe.train, recomputed_modules(recipe)
    modules |= {"shared_experts"} if "moe" in modules else set()
    own = tokens / (tp if recipe.parallel.sequence_parallel else 1)
    width = model.moe_ffn_hidden_size or model.ffn_hidden_size
    matrices = 3 if getattr(model, "gated_linear_unit", True) else 2  # of an MLP
    total = 0.0
    dense, _ = stage_parameters(recipe, layout, rows, stage)
    attention = tokens * heads / tp * (key + value) * (recipe.data.sequence_length if attended is None else attended)
    weights = dense - tables(recipe, layout, stage) * rows // tp * model.hidden_size  # of the layers
    for place, number in enumerate(numbers):
        parts = {"core_attn": attention, "": 2.0 * tokens * weights / len(numbers)}
        if has_experts(model, number):
            parts["moe"] = 2.0 * own * model.moe_router_topk * matrices * model.hidden_size * width
            parts["shared_experts"] = 2.0 * tokens * matrices * model.hidden_size * (model.moe_shared_expert_intermediate_size or 0) / tp
            parts[""] -= parts["shared_experts"]
        else:
            inner = 2.0 * tokens * matrices * model.hidden_size * model.ffn_hidden_size / tp
            parts["mlp"], parts[""] = inner, parts[""] - inner
        per_chunk = len(numbers) // layout.vpp or 1
        whole = train.recompute_granularity == "full" and (
            train.recompute_method == "uniform" or place % per_chunk < (train.recompute_num_layers or 0)
        )
        total += sum(flops * (4 if whole or part in modules else 3) for part, flops in parts.items())
    if stage == layout.pp - 1:
        logits = 2.0 * tokens * scored * rows / tp * model.hidden_size
        total += (1 + (model.mtp_num_layers or 0)) * logits * (4 if tokens * scored * rows / tp > 2**26 else 3)  # megalign/kernels/logprob.py computes them again
    return total


def seconds(traffic: Traffic, layout: Layout, device: Device) -> float:
    """Bytes sent over the slowest wire of the axis. Ranks stand in the order tp, cp, dp, pp (experts: etp, ep, dp, pp)."""
    strides = {
        "tensor": 1,
        "context": layout.tp,
        "data": layout.tp,
        "expert_tensor": 1,
        "expert": layout.etp,
        "expert_data": layout.etp * layout.ep,
        "pipeline": layout.world // layout.pp,
    }
    reach = strides[traffic.axis] * traffic.ranks
    return traffic.sent / (device.link if reach <= device.node_size else device.network)


def _once_a_step(traffic: Traffic) -> bool:
    return traffic.axis in ("data", "expert_data") or traffic.why.startswith("gradient")

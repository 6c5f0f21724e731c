"""Bytes that autograd keeps for the backward of one layer, tensor by tensor, as our layers are written.

The counting is that of Korthikanti et al. 2022 (arXiv:2205.05198, section 4.1), adapted: attention by SDPA keeps
queries, keys, values, its output and a number a head and position instead of S x S scores; a SwiGLU has a gate;
grouped keys and values are repeated before attention; experts see a token once a choice; the head works on scored
tokens alone. A line of `layer_tensors` is one tensor (or group of them) that torch keeps.

# D hidden size, H query heads, G key/value heads, K head size, V value size, F width of an MLP, E experts
"""

from __future__ import annotations

from dataclasses import dataclass

from megalign.config.layout import Layout
from megalign.config.schema import ModelConfig, Recipe

FP32 = 4  # bytes
HEAD_CHUNK, HEAD_KEPT = 2048, 2**26  # of megalign/kernels/logprob.py: rows of a chunk; logits below which all are kept, and of a chunk


@dataclass(frozen=True)
class Kept:
    """`bytes` a token of a rank's microbatch (before sequence parallelism cuts it); `part`: the module of
    Megatron's recompute_modules that computes it again, empty if none does."""

    name: str
    part: str
    bytes: float


def head_sizes(model: ModelConfig) -> tuple[int, int, int, int]:
    """H, G, K, V. Latent attention (MLA) works on full heads: G = H, keys of a plain and a rotary part."""
    heads = model.num_attention_heads
    if getattr(model, "multi_latent_attention", False):
        parts = [getattr(model, name) for name in ("qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")]
        return heads, heads, parts[0] + parts[1], parts[2]
    size = model.kv_channels or model.hidden_size // heads
    return heads, model.num_query_groups or heads, size, size


def has_experts(model: ModelConfig, number: int) -> bool:
    """Layer `number` (from 0) has experts: all of them, or as Megatron's moe_layer_freq says. One inside a prediction
    module, behind the last, is like the last."""
    number = min(number, model.num_layers - 1)
    if model.num_moe_experts is None:
        return False
    frequency = getattr(model, "moe_layer_freq", None) or 1
    return number % frequency == 0 if isinstance(frequency, int) else bool(frequency[number])


def layer_tensors(recipe: Recipe, layout: Layout, number: int, device: str = "cuda") -> list[Kept]:
    """What layer `number` (from 0) keeps when nothing is recomputed.

    A norm keeps its input and a number a row. device: on "cpu" latent attention, whose keys and values differ in size, has no fused kernel: it keeps FP32 operands and S scores a head and
    token, S being the sequence length (less where documents are shorter).
    """
    model, tp, width = recipe.model, layout.tp, width_of(recipe)
    full = layout.tp if recipe.parallel.sequence_parallel else 1  # what full-width tensors are cut by
    hidden = model.hidden_size
    tensors = [
        *_norm("input_layernorm", hidden / full, width),
        *_attention(recipe, layout, device),
        *_norm("pre_mlp_layernorm", hidden / full, width),
    ]
    if not has_experts(model, number):
        # SwiGLU: [gate, up], and their product as fc2's input (kernels/elementwise.py). Another gate is left to
        # autograd, which keeps the activated gate and the other factor too.
        copies = 3 if _swiglu(model) else 5 if getattr(model, "gated_linear_unit", True) else 2
        return [*tensors, Kept("mlp", "mlp", copies * width * model.ffn_hidden_size / tp)]
    return [*tensors, *_experts(model, layout, full, width)]


def _swiglu(model: ModelConfig) -> bool:
    return model.gated_linear_unit and model.activation_func == "silu"


def _norm(name: str, size: float, width: int, part: str = "layernorm") -> list[Kept]:
    """The input, a number a row, and the output (kept as the next matmul's input)."""
    return [Kept(f"{name} input", part, width * size + FP32), Kept(f"{name} output", part, width * size)]


def _attention(recipe: Recipe, layout: Layout, device: str) -> list[Kept]:
    """Queries, repeated keys and values, output; cos and sin of the positions, for queries and for keys."""
    model, width = recipe.model, width_of(recipe)
    heads, groups, key, value = head_sizes(model)
    heads, groups = heads / layout.tp, max(1.0, groups / layout.tp)
    latent, rotary = bool(getattr(model, "multi_latent_attention", False)), float(key)
    unfused = latent and device == "cpu"
    inner = FP32 if unfused else width
    tensors = [
        Kept("queries", "core_attn", inner * heads * key),
        Kept("keys and values, repeated", "core_attn", inner * heads * (key + value) * layout.cp),
        Kept("softmax statistics", "core_attn", FP32 * heads * (recipe.data.sequence_length if unfused else 1)),
        Kept("attention output", "core_attn", 0 if unfused else width * heads * value),
        Kept("output projection's input", "", width * heads * value),
    ]
    if latent:
        rotary = getattr(model, "qk_pos_emb_head_dim", 0)
        tensors += _norm("queries' latent", getattr(model, "q_lora_rank", None) or 0, width, "")
        tensors += _norm("keys' and values' latent", getattr(model, "kv_lora_rank", 0), width, "")
    elif model.qk_layernorm:
        tensors.append(Kept("query and key norms", "", (heads + groups) * (key * width + FP32)))
    if model.position_embedding_type == "rope":  # of half the angles, unless upstream turns the heads
        tensors.append(Kept("rotary cos and sin", "", (4 if latent else 2) * width * rotary))
    return tensors


def _experts(model: ModelConfig, layout: Layout, full: int, width: int) -> list[Kept]:
    """A choice brings its token, permuted (and gathered over etp), and [gate, up], their product and the weighted product
    of a slice of the width; balanced routing."""
    size = model.moe_ffn_hidden_size or model.ffn_hidden_size
    choices, experts = model.moe_router_topk / full, model.num_moe_experts or 0
    tensors = [
        Kept("permuted tokens", "moe", choices * layout.etp * width * model.hidden_size),
        Kept("experts", "moe", choices * (4 if _swiglu(model) else 6) * width * size),
        Kept("router", "moe", (4 * FP32 * experts + model.moe_router_topk * 16) / full),
    ]
    if model.moe_shared_expert_intermediate_size:
        shared = (3 if _swiglu(model) else 5) * width * model.moe_shared_expert_intermediate_size / layout.tp
        tensors.append(Kept("shared expert", "shared_experts", shared))
    return tensors


def prediction_bytes(recipe: Recipe, layout: Layout, *, recomputed: bool = False) -> float:
    """Bytes a token that a prediction module keeps besides its layer and its head: two norms, their outputs side by side.

    recomputed: as a whole; then it keeps the embedding ahead, beside the layer's own boundary.
    """
    model, width = recipe.model, width_of(recipe)
    full = layout.tp if recipe.parallel.sequence_parallel else 1
    inside = 2 * (width * model.hidden_size / full + FP32)
    if recomputed:
        return width * model.hidden_size / full
    return inside + 2 * width * model.hidden_size / full


def kept_bytes(recipe: Recipe, layout: Layout, number: int, modules: frozenset[str], device: str = "cuda") -> float:
    """Bytes a token that layer `number` keeps when `modules` are recomputed: what is left, and their inputs."""
    model, width = recipe.model, width_of(recipe)
    full = layout.tp if recipe.parallel.sequence_parallel else 1
    again = modules | ({"shared_experts"} if "moe" in modules else set())
    kept = sum(tensor.bytes for tensor in layer_tensors(recipe, layout, number, device) if tensor.part not in again)
    if "layernorm" in modules:  # the input of each norm, in the dtype of the hidden states
        kept += 2 * width * model.hidden_size / full
        # What the norm before experts or MLP gives is an input of theirs; discarded all the same.
    if "core_attn" in modules:  # queries, and the fused projection of which values are a view
        heads, groups, key, value = head_sizes(model)
        groups = max(1.0, groups / layout.tp)
        kept += width * (heads / layout.tp * key + groups * (key + value) + (heads / layout.tp + groups) * key)
    return kept


def head_bytes(recipe: Recipe, layout: Layout, rows: int, tokens: int, scored: float) -> int:
    """The end of the last stage: the final norm, the scored positions, and their logits.

    scored: share of the tokens that are scored. Logits stay in FP32 until backward up to 2^26 of them; beyond that
    a chunk of 2048 rows, or of 2^26 logits, at a time lives, in FP32 and in the training precision.
    """
    width, hidden = width_of(recipe), recipe.model.hidden_size
    full = layout.tp if recipe.parallel.sequence_parallel else 1
    count = int(tokens * scored)
    norm = tokens * hidden / full * width
    logits = count * rows // layout.tp
    if logits > HEAD_KEPT:
        chunk = min(count, HEAD_CHUNK, max(64, HEAD_KEPT * layout.tp // rows))
        return int(norm + count * hidden * width + chunk * rows // layout.tp * (FP32 + width))
    return int(norm + count * hidden * width + logits * FP32)


def width_of(recipe: Recipe) -> int:
    """Bytes of one weight or activation."""
    return {"fp32": 4, "bf16": 2}[recipe.train.precision]

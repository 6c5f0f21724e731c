"""What is allowed and probably not meant: ranges that fine-tuning runs have settled on."""

from __future__ import annotations

from megalign.config.layout import layout_of
from megalign.config.schema import Recipe

FULL_FINE_TUNING_LR = (1e-6, 5e-5)
LORA_LR = (1e-4, 3e-4)
EPOCHS = 3.0
WARMUP_SHARE = (0.03, 0.10)
MIXTURE_SHARES = {"human": (0.10, 0.30), "reviewed": (0.10, 0.20), "synthetic": (0.50, 0.70), "replay": (0.05, 0.20)}


def warnings(recipe: Recipe, world_size: int | None = None) -> list[str]:
    """One sentence each, with field, value, range and reason; empty for a recipe without surprises."""
    model, optimizer, train, data = recipe.model, recipe.optimizer, recipe.train, recipe.data
    layout = layout_of(recipe, world_size)
    found = []

    adapted = recipe.lora.rank is not None
    (low, high), what = (LORA_LR, "LoRA") if adapted else (FULL_FINE_TUNING_LR, "full fine-tuning")
    if model.init_from and not low <= optimizer.lr <= high:
        side, harm = ("above", "forget what it knew") if optimizer.lr > high else ("below", "barely move")
        found.append(f"optimizer.lr={optimizer.lr:g} is {side} the usual {low:g} to {high:g} of {what}: the model may {harm}")
    elif not model.init_from and adapted:
        found.append("lora.rank without model.init_from: the frozen weights are random, and adapters can repair little of that")
    elif not model.init_from and optimizer.lr <= high:
        found.append(
            f"model.init_from=null: the weights are random, and optimizer.lr={optimizer.lr:g} is a rate of fine-tuning, at most "
            f"{high:g}; give model.init_from a Hugging Face folder, or raise the rate"
        )
    if train.max_steps is None and train.epochs > EPOCHS:
        found.append(
            f"train.epochs={train.epochs:g}: past {EPOCHS:g} epochs a model mostly memorises; watch eval_loss"
        )

    low, high = WARMUP_SHARE
    steps, warmup = train.max_steps, optimizer.lr_warmup_steps
    if steps and (warmup or model.init_from) and not low <= warmup / steps <= high:
        found.append(
            f"optimizer.lr_warmup_steps={warmup} is {warmup / steps:.0%} of {steps} steps; "
            f"{low:.0%} to {high:.0%} is usual, here {max(1, round(low * steps))} to {max(1, round(high * steps))}"
        )
    how = optimizer.scale_lr_with_data_parallel
    if how != "none" and layout.dp > 1:
        found.append(
            f"optimizer.scale_lr_with_data_parallel={how} raises the learning rate for {layout.dp} data-parallel "
            f"ranks, but a step stays train.global_batch_size={train.global_batch_size} rows: raise that with it"
        )
    if data.sequence_length > model.max_position_embeddings:
        found.append(
            f"data.sequence_length={data.sequence_length} is beyond model.max_position_embeddings="
            f"{model.max_position_embeddings}: positions that the model was never meant to see"
        )
    if recipe.parallel.overlap_param_gather and not recipe.parallel.overlap_grad_reduce:
        found.append(
            "parallel.overlap_param_gather=true without overlap_grad_reduce: all parameters are one bucket "
            "(megatron-core's distributed_data_parallel.py:67), and gathering it overlaps nothing"
        )
    if recipe.kernels.fp8_backend != "auto":
        found.append(
            f"kernels.fp8_backend={recipe.kernels.fp8_backend}: no layer of a recipe computes in FP8 yet, so training is the same with every choice"
        )
    if max(model.attention_dropout, model.hidden_dropout, recipe.lora.dropout) > 0:
        found.append("dropout > 0: results depend on the parallel layout, because its random numbers do")
    return found + _about_experts(recipe) + _about_mixture(recipe)


def _about_mixture(recipe: Recipe) -> list[str]:
    """Shares of human, reviewed and synthetic data among each other, and of replay in all."""
    sources = recipe.data.mixture or []
    total = {kind: sum(source.weight for source in sources if source.kind == kind) for kind in MIXTURE_SHARES}
    written = sum(weight for kind, weight in total.items() if kind != "replay")
    everything = sum(source.weight for source in sources)
    found = []
    for kind, (low, high) in MIXTURE_SHARES.items():
        of, whole = ("all tokens", everything) if kind == "replay" else ("the tokens that are human, reviewed or synthetic", written)
        named = kind != "replay" or any(source.kind == "replay" for source in sources)
        share = total[kind] / whole if whole else 0.0
        if whole and named and not low - 1e-9 <= share <= high + 1e-9:
            found.append(f"data.mixture: {kind} data is {share:.0%} of {of}; {low:.0%} to {high:.0%} is usual")
    return found


def _about_experts(recipe: Recipe) -> list[str]:
    model, found = recipe.model, []
    if model.num_moe_experts is None:
        return []
    capacity = model.moe_expert_capacity_factor
    if capacity is not None and capacity < 1:
        found.append(
            f"model.moe_expert_capacity_factor={capacity:g} is below 1: tokens are dropped even when all experts "
            "get equally many"
        )
    balanced = model.moe_aux_loss_coeff or model.moe_router_enable_expert_bias
    if model.num_moe_experts > model.moe_router_topk and not balanced and not model.init_from:
        found.append(
            "model.moe_aux_loss_coeff=0: nothing balances the load, and few experts may take all tokens; 0.01 is usual"
        )
    return found

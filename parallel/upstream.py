"""Errors of megatron-core 0.16.1 that show on every device, mended. Registered, with line and reason, in `patches.py`."""

from __future__ import annotations

import functools
import importlib.util
import queue
from typing import Any

import torch
import torch.distributed as dist


def te_gemm_name() -> None:
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def reduce_strided() -> None:
    from megatron.core.tensor_parallel import mappings

    upstream = mappings._reduce
    mappings._reduce = lambda input_, group: upstream(input_.contiguous(), group)


def results_queue() -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    # A save that is not asynchronous puts and gets in one process.
    filesystem_async._get_write_results_queue = queue.SimpleQueue


def optimizer_state_step() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    @torch.no_grad()
    def set_states(self: Any, model_param: Any, tensors: dict[str, torch.Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][order]
        for name, value in {"param": main, **self.optimizer.state[main]}.items():
            if name != "step":  # the step of torch's AdamW is restored from the parameter groups
                value.copy_(tensors[name])

    upstream = DistributedOptimizer._set_main_param_and_optimizer_states

    def set_main_param_and_optimizer_states(self: Any, model_param: Any, tensors: dict[str, torch.Tensor]) -> None:
        special = self.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
        (upstream if special else set_states)(self, model_param, tensors)

    DistributedOptimizer._set_main_param_and_optimizer_states = set_main_param_and_optimizer_states


def optimizer_shared_step() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    upstream = DistributedOptimizer.load_state_dict

    @functools.wraps(upstream)
    def load_state_dict(self: Any, state_dict: dict) -> None:
        upstream(self, state_dict)
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()

    DistributedOptimizer.load_state_dict = load_state_dict


def latent_attention_te() -> None:
    from megatron.core.transformer import multi_latent_attention

    multi_latent_attention.HAVE_TE = importlib.util.find_spec("transformer_engine") is not None


def padded_expert_bias() -> None:
    from megatron.core.transformer.moe.router import TopKRouter

    def apply_expert_bias(self: Any, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None) -> None:
        """Count the real tokens of each expert, routing_map [T, E], padding_mask [T]."""
        if self.enable_expert_bias and torch.is_grad_enabled():
            with torch.no_grad():
                real = routing_map if padding_mask is None else routing_map & ~padding_mask.unsqueeze(-1)
                self.local_tokens_per_expert += real.sum(dim=0)

    TopKRouter._apply_expert_bias = apply_expert_bias


def group_scores() -> None:
    from megatron.core.transformer.moe import moe_utils, router

    upstream = moe_utils.topk_routing_with_score_function
    best_experts = 2

    def group_limited_topk(
        scores: torch.Tensor, topk: int, num_tokens: int, num_experts: int, num_groups: int, group_topk: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The best `topk` of the experts in the best `group_topk` groups, scores [T, E]."""
        grouped = scores.view(num_tokens, num_groups, -1)
        of_group = grouped.topk(min(best_experts, grouped.shape[-1]), dim=-1).values.sum(-1)
        chosen = torch.zeros_like(of_group, dtype=torch.bool).scatter_(1, of_group.topk(group_topk, dim=-1).indices, True)
        return grouped.masked_fill(~chosen.unsqueeze(-1), float("-inf")).view(num_tokens, num_experts).topk(topk, dim=-1)

    @functools.wraps(upstream)
    def topk_routing(*args: Any, score_function: str = "softmax", **kwargs: Any) -> Any:
        nonlocal best_experts
        best_experts = {"softmax": 1, "sigmoid": 2}[score_function]
        return upstream(*args, score_function=score_function, **kwargs)

    moe_utils.group_limited_topk = group_limited_topk
    router.topk_routing_with_score_function = topk_routing


def padded_z_loss() -> None:
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.router import TopKRouter

    upstream = TopKRouter.apply_z_loss

    @functools.wraps(upstream)
    def apply_z_loss(self: Any, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Mean of logsumexp(logits)^2 over the real tokens of the whole group, logits [tokens of this rank, E]."""
        coefficient = self.config.moe_z_loss_coeff
        if padding_mask is None or not coefficient or not self.training or not torch.is_grad_enabled():
            return upstream(self, logits, padding_mask)
        valid = ~padding_mask
        tokens = valid.sum().float()
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(tokens, group=self.tp_cp_group)
        part = (torch.logsumexp(logits, dim=-1).square() * valid).sum() / tokens.clamp(min=1.0)
        layers = self.config.num_layers + (self.config.mtp_num_layers or 0)
        moe_utils.save_to_aux_losses_tracker("z_loss", part, self.layer_number, layers, reduce_group=self.tp_cp_group)
        return moe_utils.MoEAuxLossAutoScaler.apply(logits, part * coefficient)

    TopKRouter.apply_z_loss = apply_z_loss


def empty_aux_loss() -> None:
    from megatron.core.transformer.moe import router

    upstream = router.switch_load_balancing_loss_func

    @functools.wraps(upstream)
    def balance(probs: torch.Tensor, tokens_per_expert: torch.Tensor, total_num_tokens: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        counted: Any = total_num_tokens.clamp(min=1) if torch.is_tensor(total_num_tokens) else max(1, total_num_tokens)
        return upstream(probs, tokens_per_expert, counted, *args, **kwargs)

    router.switch_load_balancing_loss_func = balance


def block_padding() -> None:
    from megatron.core.transformer.transformer_block import TransformerBlock

    upstream = TransformerBlock._checkpointed_forward

    @functools.wraps(upstream)
    def checkpointed_forward(self: Any, *args: Any, padding_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if padding_mask is None or self.config.recompute_method != "block":
            return upstream(self, *args, padding_mask=padding_mask, **kwargs)
        find = self._get_layer

        def layer_with_mask(index: int) -> Any:
            layer = find(index)

            def call(**inputs: Any) -> Any:
                return layer(**{**inputs, "padding_mask": padding_mask})

            call.layer_number = layer.layer_number
            return call

        self._get_layer = layer_with_mask
        try:
            return upstream(self, *args, padding_mask=padding_mask, **kwargs)
        finally:
            del self._get_layer

    TransformerBlock._checkpointed_forward = checkpointed_forward


def recompute_without_te() -> None:
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    upstream = CheckpointWithoutOutput.__init__

    @functools.wraps(upstream)
    def __init__(self: Any, fp8: Any = False) -> None:
        upstream(self, fp8)
        self.fp8 = bool(fp8)

    CheckpointWithoutOutput.__init__ = __init__


def bucket_padding() -> None:
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer

    upstream = _ParamAndGradBuffer.__init__

    @functools.wraps(upstream)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        upstream(self, *args, **kwargs)
        # A checkpoint is cut out of the buckets laid end to end, at offsets that count their padding: let it be there.
        for bucket in self.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()
        self.numel_unpadded = self.numel

    _ParamAndGradBuffer.__init__ = __init__

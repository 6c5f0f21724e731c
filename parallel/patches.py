"""Every change megalign makes to megatron-core 0.16.1, in one place.

Stock megatron-core trains correctly on CPU and gloo once its `torch.cuda` calls reach the CPU. The
largest patch therefore edits no code: the `megatron.core` modules are handed a facade of `torch` whose
`cuda` is the CPU. Outside megatron only three Tensor methods change, and those raise on a CPU build.

Each `Patch` names the upstream line that makes it necessary; `tests/parallel/test_patches.py` fails when
that line is gone or when training works without the patch, so that none outlives its reason.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import logging
import queue
import sys
import types
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

MEGATRON_VERSION = "0.16.1"
CPU = torch.device("cpu")
_installed = False


@dataclass(frozen=True)
class Patch:
    """One change: `snippet` stands at `line` of `megatron/core/<file>`; `why` it does not do here."""

    name: str
    file: str
    line: int
    snippet: str
    why: str
    apply: Callable[[], None]
    cpu_only: bool = True


def install(skip: Collection[str] = ()) -> None:
    """Apply the patches that this machine needs, once. `skip` names patches to leave out (tests).

    Raises RuntimeError for another megatron-core than the one whose lines are named here.
    """
    global _installed
    found = importlib.metadata.version("megatron-core")
    if found != MEGATRON_VERSION:
        raise RuntimeError(
            f"megatron-core is {found}, but megalign's patches are written for {MEGATRON_VERSION}; "
            f"pip install megatron-core=={MEGATRON_VERSION}"
        )
    if _installed:
        return
    import_megatron()
    for patch in PATCHES:
        if patch.name not in skip and not (patch.cpu_only and torch.cuda.is_available()):
            patch.apply()
    _installed = True


# What every run needs; imported at once, quietly, so that a fork server can share it.
_MODULES = (
    "dist_checkpointing",
    "dist_checkpointing.exchange_utils",
    "dist_checkpointing.strategies.async_utils",
    "dist_checkpointing.strategies.filesystem_async",
    "dist_checkpointing.strategies.fully_parallel",
    "dist_checkpointing.strategies.state_dict_saver",
    "dist_checkpointing.strategies.torch",
    "distributed",
    "inference.communication_utils",
    "inference.contexts",
    "models.gpt",
    "models.gpt.gpt_layer_specs",
    "optimizer",
    "pipeline_parallel",
    "tensor_parallel",
    "transformer.moe.moe_layer",
    "transformer.multi_latent_attention",
)


def import_megatron() -> None:
    """Import the parts of megatron-core that megalign uses, without their notices of missing extras."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in _MODULES:
            importlib.import_module(f"megatron.core.{name}")


# -- CPU: a torch whose `cuda` is the CPU ---------------------------------------------------------------


class _Facade(types.ModuleType):
    """A module that answers like `base`, except for the names given."""

    def __init__(self, base: types.ModuleType, **overrides: Any):
        super().__init__(base.__name__)
        self.__dict__.update(overrides, _base=base)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_base"], name)


class _Stream:
    """Stands for a CUDA stream or event: on the CPU everything is already in order."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def record_event(self, *args: Any) -> _Stream:
        return _Stream()

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *args: Any) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0

    record = wait = wait_stream = wait_event = synchronize = lambda self, *args: None


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.empty(..., device="cuda", pin_memory=True)` becomes a plain CPU tensor."""

    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return create


def _redirect_device() -> None:
    random = types.SimpleNamespace(
        get_rng_state=lambda *_, **__: torch.get_rng_state(),
        set_rng_state=lambda state, *_, **__: torch.set_rng_state(state),
        # Not torch.manual_seed: it seeds CUDA as well, through the name replaced here.
        manual_seed=lambda seed: torch.default_generator.manual_seed(seed),
    )
    nvtx = types.SimpleNamespace(range_push=_nothing, range_pop=_nothing)
    cuda = _Facade(
        torch.cuda,
        Stream=_Stream,
        Event=_Stream,
        current_device=lambda: CPU,
        current_stream=lambda *_: _Stream(),
        default_stream=lambda *_: _Stream(),
        stream=lambda *_: contextlib.nullcontext(),
        is_current_stream_capturing=lambda: False,
        synchronize=_nothing,
        empty_cache=_nothing,
        set_device=_nothing,
        device_count=lambda: 1,  # async_utils.py:488 takes a rank modulo this
        memory_allocated=lambda *_: 0,
        max_memory_allocated=lambda *_: 0,
        memory_reserved=lambda *_: 0,
        nvtx=nvtx,
        random=random,
        **vars(random),
    )
    names = "empty zeros ones full tensor as_tensor arange linspace rand randn randint Generator"
    factories = {name: _on_cpu(getattr(torch, name)) for name in names.split()}
    factories |= {f"{name}_like": _on_cpu(getattr(torch, f"{name}_like")) for name in ("empty", "zeros", "ones", "full")}
    facade = _Facade(torch, cuda=cuda, **factories)
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core"):
            _hand_over(module, facade)
    sys.meta_path.insert(0, _LaterImports(facade))


def _hand_over(module: types.ModuleType, facade: types.ModuleType) -> None:
    if getattr(module, "torch", None) is torch:
        module.torch = facade  # pyright: ignore[reportAttributeAccessIssue]


class _LaterImports(importlib.abc.MetaPathFinder):
    """Hands the facade to megatron modules that are imported after the patch."""

    def __init__(self, facade: types.ModuleType):
        self.facade = facade

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if not name.startswith("megatron.core"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: types.ModuleType) -> None:
                execute(module)
                _hand_over(module, self.facade)

            spec.loader.exec_module = exec_module
        return spec


def _tensor_methods() -> None:
    plain_type = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = plain_type(self, *args, **kwargs)
        asked_by_megatron = "megatron/core/optimizer" in sys._getframe(1).f_code.co_filename
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) and asked_by_megatron else result

    torch.Tensor.type = type_  # pyright: ignore[reportAttributeAccessIssue]
    torch.Tensor.cuda = lambda self, *_, **__: self  # pyright: ignore[reportAttributeAccessIssue]
    torch.Tensor.record_stream = _nothing  # pyright: ignore[reportAttributeAccessIssue]


def _rng() -> None:
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    # It warns whenever the CPU generator moved inside a fork; here that generator is the one meant.
    logging.getLogger(random.__name__).setLevel(logging.ERROR)


def _no_compile() -> None:
    torch.compiler.set_stance("force_eager")


def _split_sizes() -> None:
    from megatron.core.transformer.moe import token_dispatcher

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if torch.is_tensor(tensor) and as_numpy else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = to_host


def _uneven_collectives() -> None:
    from megatron.core.tensor_parallel import mappings

    even_gather, even_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather(x: torch.Tensor, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return even_gather(x, group, output_split_sizes, use_global_buffer)
        world, sizes = group.size(), [int(n) for n in output_split_sizes]
        out = x.new_empty(sum(sizes), *x.shape[1:])
        to_all = x.repeat(world, *[1] * (x.dim() - 1))
        dist.all_to_all_single(out, to_all, sizes, [x.shape[0]] * world, group=group)
        return out

    def reduce_scatter(x: torch.Tensor, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return even_scatter(x, group, input_split_sizes, use_global_buffer)
        world, sizes = group.size(), [int(n) for n in input_split_sizes]
        mine = sizes[group.rank()]
        parts = x.new_empty(mine * world, *x.shape[1:])
        dist.all_to_all_single(parts, x.contiguous(), [mine] * world, sizes, group=group)
        return parts.view(world, mine, *x.shape[1:]).sum(0)

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather, reduce_scatter


# -- upstream bugs, on every device ---------------------------------------------------------------------


def _te_gemm_name() -> None:
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _results_queue() -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    # A save that is not asynchronous puts and gets in one process.
    filesystem_async._get_write_results_queue = queue.SimpleQueue


def _optimizer_state_step() -> None:
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


def _optimizer_shared_step() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    upstream = DistributedOptimizer.load_state_dict

    @functools.wraps(upstream)
    def load_state_dict(self: Any, state_dict: dict) -> None:
        upstream(self, state_dict)
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()

    DistributedOptimizer.load_state_dict = load_state_dict


def _latent_attention_te() -> None:
    from megatron.core.transformer import multi_latent_attention

    multi_latent_attention.HAVE_TE = importlib.util.find_spec("transformer_engine") is not None


def _padded_expert_bias() -> None:
    from megatron.core.transformer.moe.router import TopKRouter

    def apply_expert_bias(self: Any, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None) -> None:
        """Count the real tokens of each expert, routing_map [T, E], padding_mask [T]."""
        if self.enable_expert_bias and torch.is_grad_enabled():
            with torch.no_grad():
                real = routing_map if padding_mask is None else routing_map & ~padding_mask.unsqueeze(-1)
                self.local_tokens_per_expert += real.sum(dim=0)

    TopKRouter._apply_expert_bias = apply_expert_bias


def _group_scores() -> None:
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


def _padded_z_loss() -> None:
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


def _empty_aux_loss() -> None:
    from megatron.core.transformer.moe import router

    upstream = router.switch_load_balancing_loss_func

    @functools.wraps(upstream)
    def balance(probs: torch.Tensor, tokens_per_expert: torch.Tensor, total_num_tokens: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        counted = total_num_tokens.clamp(min=1) if torch.is_tensor(total_num_tokens) else max(1, total_num_tokens)
        return upstream(probs, tokens_per_expert, counted, *args, **kwargs)

    router.switch_load_balancing_loss_func = balance


def _block_padding() -> None:
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


def _recompute_without_te() -> None:
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    upstream = CheckpointWithoutOutput.__init__

    @functools.wraps(upstream)
    def __init__(self: Any, fp8: Any = False) -> None:
        upstream(self, fp8)
        self.fp8 = bool(fp8)

    CheckpointWithoutOutput.__init__ = __init__


PATCHES = (
    Patch("device", "pipeline_parallel/schedules.py", 596, 'device="cuda"', "CUDA devices, streams and literals", _redirect_device),
    Patch("tensor-methods", "optimizer/clip_grads.py", 167, "'torch.cuda.FloatTensor'", "dtypes are told by CUDA type names", _tensor_methods),
    Patch("rng", "tensor_parallel/random.py", 55, "torch.cuda.random.get_rng_state", "the tracker keeps CUDA generator states", _rng),
    Patch("no-compile", "jit.py", 21, "jit_fuser = torch.compile", "compiling at start-up costs minutes on a CPU", _no_compile),
    Patch("split-sizes", "transformer/moe/moe_utils.py", 1093, "tensor.is_cuda", "split sizes stay tensors, where lists are needed", _split_sizes),
    Patch(
        "uneven-collectives",
        "tensor_parallel/mappings.py",
        150,
        "torch.distributed.all_gather(output_tensor_list",
        "gloo has no all-gather of uneven parts (ETP > 1 with EP > 1)",
        _uneven_collectives,
    ),
    Patch(
        "te-gemm-name",
        "transformer/moe/moe_utils.py",
        1192,
        "te_general_gemm is not None",
        "NameError: never defined without Transformer Engine",
        _te_gemm_name,
        cpu_only=False,
    ),
    Patch(
        "results-queue",
        "dist_checkpointing/strategies/filesystem_async.py",
        55,
        "_results_queue = ctx.Manager().Queue()",
        "a spawned manager process for a queue inside one process: seconds to start, an orphan after kill -9",
        _results_queue,
        cpu_only=False,
    ),
    Patch(
        "optimizer-state-step",
        "optimizer/distrib_optimizer.py",
        940,
        "dst_tensors[key].copy_(tensors[key])",
        "KeyError 'step' with torch's AdamW when a checkpoint is loaded",
        _optimizer_state_step,
        cpu_only=False,
    ),
    Patch(
        "optimizer-shared-step",
        "optimizer/distrib_optimizer.py",
        825,
        's["step"] = step',
        "all parameters get the SAME step tensor: after a resume the step counts every parameter",
        _optimizer_shared_step,
        cpu_only=False,
    ),
    Patch(
        "padded-z-loss",
        "transformer/moe/router.py",
        487,
        "z_loss_func(logits, moe_z_loss_coeff, padding_mask=padding_mask)",
        "with padding each rank takes the mean over its own tokens: another loss on every layout",
        _padded_z_loss,
        cpu_only=False,
    ),
    Patch(
        "empty-aux-loss",
        "transformer/moe/moe_utils.py",
        131,
        "num_experts * moe_aux_loss_coeff / (topk * total_num_tokens * total_num_tokens)",
        "0 / 0 for a microbatch of padding alone, as at the end of an epoch: NaN gradients though no loss is NaN",
        _empty_aux_loss,
        cpu_only=False,
    ),
    Patch(
        "block-padding",
        "transformer/transformer_block.py",
        563,
        "hidden_states, attention_mask, context, context_mask, rotary_pos_emb",
        "recompute_method block: layers that are not recomputed get no padding mask, so routers count padding there",
        _block_padding,
        cpu_only=False,
    ),
    Patch(
        "recompute-without-te",
        "tensor_parallel/random.py",
        636,
        "self.fp8 = fp8 is not None",
        "False is not None: recomputed norms ask Transformer Engine for FP8 even where neither is there",
        _recompute_without_te,
        cpu_only=False,
    ),
    Patch(
        "padded-expert-bias",
        "transformer/moe/router.py",
        542,
        "routing_map = routing_map & (~padding_mask)",
        "[tokens, experts] & [tokens]: an error, or, with as many tokens as experts, the wrong expert left out",
        _padded_expert_bias,
        cpu_only=False,
    ),
    Patch(
        "group-scores",
        "transformer/moe/moe_utils.py",
        554,
        "scores.view(num_tokens, num_groups, -1).topk(topk // group_topk, dim=-1)",
        "a group counts by its best expert in DeepSeek-V2 and by its best two in V3, whatever the quotient",
        _group_scores,
        cpu_only=False,
    ),
    Patch(
        "latent-attention-te",
        "transformer/multi_latent_attention.py",
        185,
        "and isinstance(self.linear_proj, TELinear)",
        "HAVE_TE is true without Transformer Engine, and TELinear no class",
        _latent_attention_te,
        cpu_only=False,
    ),
)

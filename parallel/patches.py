"""The list of every change megalign makes to megatron-core 0.16.1: to run on a CPU (`cpu.py`), to be right (`upstream.py`).

Each `Patch` names the upstream line that makes it necessary; `tests/parallel/test_patches.py` fails when that line is gone
or when training works without the patch, so that none outlives its reason.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from megalign.parallel import cpu, upstream

MEGATRON_VERSION = "0.16.1"
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
    """Import the parts of megatron-core that megalign uses, without their notices of missing extras.

    On a CPU its functions stay undecorated (patch `no-compile`): that alone saves the import of inductor.
    """
    with warnings.catch_warnings(), contextlib.nullcontext() if torch.cuda.is_available() else cpu.undecorated():
        warnings.simplefilter("ignore")
        for name in _MODULES:
            importlib.import_module(f"megatron.core.{name}")


PATCHES = (
    Patch("device", "pipeline_parallel/schedules.py", 596, 'device="cuda"', "CUDA devices, streams and literals", cpu.redirect_device),
    Patch("tensor-methods", "optimizer/clip_grads.py", 167, "'torch.cuda.FloatTensor'", "dtypes are told by CUDA type names", cpu.tensor_methods),
    Patch("rng", "tensor_parallel/random.py", 55, "torch.cuda.random.get_rng_state", "the tracker keeps CUDA generator states", cpu.rng),
    Patch("no-compile", "jit.py", 21, "jit_fuser = torch.compile", "inductor: seconds to import in every rank, minutes to compile on a CPU", cpu.no_compile),
    Patch("split-sizes", "transformer/moe/moe_utils.py", 1093, "tensor.is_cuda", "split sizes stay tensors, where lists are needed", cpu.split_sizes),
    Patch(
        "uneven-collectives",
        "tensor_parallel/mappings.py",
        150,
        "torch.distributed.all_gather(output_tensor_list",
        "gloo has no all-gather of uneven parts (ETP > 1 with EP > 1)",
        cpu.uneven_collectives,
    ),
    Patch(
        "rotary-copies",
        "models/common/embeddings/rope_utils.py",
        126,
        "torch.cat((t, t_pass), dim=-1)",
        "four copies of queries and keys each way, for a half turned by cat and a rest that is empty",
        cpu.rotary_copies,
    ),
    Patch(
        "lone-reduction",
        "distributed/param_and_grad_buffer.py",
        443,
        "grad_reduce_handle = dist_reduce_scatter_func(",
        "gloo copies the whole gradient buffer twice where a group has one rank and nothing is to be added",
        cpu.lone_reduction,
    ),
    Patch(
        "te-gemm-name",
        "transformer/moe/moe_utils.py",
        1192,
        "te_general_gemm is not None",
        "NameError: never defined without Transformer Engine",
        upstream.te_gemm_name,
        cpu_only=False,
    ),
    Patch(
        "reduce-strided",
        "tensor_parallel/mappings.py",
        31,
        "torch.distributed.all_reduce(input_.contiguous(), group=group)",
        "of a tensor with strides (a gradient cut out of another) a copy is summed, and the tensor itself returned: each rank keeps its part",
        upstream.reduce_strided,
        cpu_only=False,
    ),
    Patch(
        "results-queue",
        "dist_checkpointing/strategies/filesystem_async.py",
        55,
        "_results_queue = ctx.Manager().Queue()",
        "a spawned manager process for a queue inside one process: seconds to start, an orphan after kill -9",
        upstream.results_queue,
        cpu_only=False,
    ),
    Patch(
        "optimizer-state-step",
        "optimizer/distrib_optimizer.py",
        940,
        "dst_tensors[key].copy_(tensors[key])",
        "KeyError 'step' with torch's AdamW when a checkpoint is loaded",
        upstream.optimizer_state_step,
        cpu_only=False,
    ),
    Patch(
        "optimizer-shared-step",
        "optimizer/distrib_optimizer.py",
        825,
        's["step"] = step',
        "all parameters get the SAME step tensor: after a resume the step counts every parameter",
        upstream.optimizer_shared_step,
        cpu_only=False,
    ),
    Patch(
        "bucket-padding",
        "optimizer/distrib_optimizer.py",
        1504,
        "if missing_elems_num > 0:",
        "checkpoints of several gradient buckets, one of them padded, hold masters and moments cut at wrong offsets",
        upstream.bucket_padding,
        cpu_only=False,
    ),
    Patch(
        "padded-z-loss",
        "transformer/moe/router.py",
        487,
        "z_loss_func(logits, moe_z_loss_coeff, padding_mask=padding_mask)",
        "with padding each rank takes the mean over its own tokens: another loss on every layout",
        upstream.padded_z_loss,
        cpu_only=False,
    ),
    Patch(
        "empty-aux-loss",
        "transformer/moe/moe_utils.py",
        131,
        "num_experts * moe_aux_loss_coeff / (topk * total_num_tokens * total_num_tokens)",
        "0 / 0 for a microbatch of padding alone, as at the end of an epoch: NaN gradients though no loss is NaN",
        upstream.empty_aux_loss,
        cpu_only=False,
    ),
    Patch(
        "block-padding",
        "transformer/transformer_block.py",
        563,
        "hidden_states, attention_mask, context, context_mask, rotary_pos_emb",
        "recompute_method block: layers that are not recomputed get no padding mask, so routers count padding there",
        upstream.block_padding,
        cpu_only=False,
    ),
    Patch(
        "recompute-without-te",
        "tensor_parallel/random.py",
        636,
        "self.fp8 = fp8 is not None",
        "False is not None: recomputed norms ask Transformer Engine for FP8 even where neither is there",
        upstream.recompute_without_te,
        cpu_only=False,
    ),
    Patch(
        "padded-expert-bias",
        "transformer/moe/router.py",
        542,
        "routing_map = routing_map & (~padding_mask)",
        "[tokens, experts] & [tokens]: an error, or, with as many tokens as experts, the wrong expert left out",
        upstream.padded_expert_bias,
        cpu_only=False,
    ),
    Patch(
        "group-scores",
        "transformer/moe/moe_utils.py",
        554,
        "scores.view(num_tokens, num_groups, -1).topk(topk // group_topk, dim=-1)",
        "a group counts by its best expert in DeepSeek-V2 and by its best two in V3, whatever the quotient",
        upstream.group_scores,
        cpu_only=False,
    ),
    Patch(
        "latent-attention-te",
        "transformer/multi_latent_attention.py",
        185,
        "and isinstance(self.linear_proj, TELinear)",
        "HAVE_TE is true without Transformer Engine, and TELinear no class",
        upstream.latent_attention_te,
        cpu_only=False,
    ),
)

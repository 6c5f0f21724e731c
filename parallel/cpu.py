"""megatron-core on a CPU: its `torch.cuda` calls answered by the CPU, and what gloo cannot do done another way.

The largest change edits no code: the `megatron.core` modules are handed a facade of `torch` whose `cuda` is the CPU.
Outside megatron only three Tensor methods change, and those raise on a CPU build. Registered in `patches.py`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.machinery
import logging
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from megalign.kernels.elementwise import rotate

CPU = torch.device("cpu")


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


def redirect_device() -> None:
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


def tensor_methods() -> None:
    plain_type = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = plain_type(self, *args, **kwargs)
        asked_by_megatron = "megatron/core/optimizer" in sys._getframe(1).f_code.co_filename
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) and asked_by_megatron else result

    torch.Tensor.type = type_  # pyright: ignore[reportAttributeAccessIssue]
    torch.Tensor.cuda = lambda self, *_, **__: self  # pyright: ignore[reportAttributeAccessIssue]
    torch.Tensor.record_stream = _nothing  # pyright: ignore[reportAttributeAccessIssue]


def rng() -> None:
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    # It warns whenever the CPU generator moved inside a fork; here that generator is the one meant.
    logging.getLogger(random.__name__).setLevel(logging.ERROR)


@contextlib.contextmanager
def undecorated() -> Iterator[None]:
    """While entered, `torch.compile` leaves functions as they are: for the import of modules that decorate with it."""
    compile_ = torch.compile

    def leave(model: Any = None, **_: Any) -> Any:
        return (lambda function: function) if model is None else model

    torch.compile = leave
    try:
        yield
    finally:
        torch.compile = compile_


def no_compile() -> None:
    """For a megatron-core that was imported before us, decorated; else nothing is left to do (see `import_megatron`)."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.set_stance("force_eager")


def split_sizes() -> None:
    from megatron.core.transformer.moe import token_dispatcher

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if torch.is_tensor(tensor) and as_numpy else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = to_host


def uneven_collectives() -> None:
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


def rotary_copies() -> None:
    from megatron.core.models.common.embeddings import rope_utils

    upstream = rope_utils._apply_rotary_pos_emb_bshd

    def apply(
        t: torch.Tensor, freqs: torch.Tensor, rotary_interleaved: bool = False, multi_latent_attention: bool = False, mscale: float = 1.0
    ) -> torch.Tensor:
        if rotary_interleaved or multi_latent_attention or freqs.shape[-1] != t.shape[-1]:
            return upstream(t, freqs, rotary_interleaved, multi_latent_attention, mscale)
        half = freqs[..., : freqs.shape[-1] // 2]  # the other half is the same
        return rotate(t, (half.cos() * mscale).to(t.dtype), (half.sin() * mscale).to(t.dtype))

    rope_utils._apply_rotary_pos_emb_bshd = apply


def lone_reduction() -> None:
    from megatron.core.distributed import param_and_grad_buffer

    upstream = param_and_grad_buffer.dist_reduce_scatter_func

    @functools.wraps(upstream)
    def reduce_scatter(output: torch.Tensor, input: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        if not async_op and dist.get_world_size(group) == 1 and output.data_ptr() == input.data_ptr():
            return None
        return upstream(output, input, op=op, group=group, async_op=async_op)

    param_and_grad_buffer.dist_reduce_scatter_func = reduce_scatter

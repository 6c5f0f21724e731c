"""Gradients of copied parameters, added up by hooks in the backward pass.

`reduce_in_backward(parameters, group)` does it for any module: when the last gradient of a bucket has arrived, the bucket
goes out as one asynchronous all-reduce; the end of the backward pass waits for it.

`attach(chunks, placements, grid)` does it beside megatron's DDP, for the axes whose reducer is a hook (`placement.py`).
DDP accumulates FP32 main gradients over the microbatches; our bucket is a part of one DDP bucket, goes out once, in the
last microbatch, and comes back before DDP communicates that bucket, whose memory is thus never touched in flight. Sums
over tensor and over data ranks commute, so the order does not matter. Copies on several pipeline stages wait for the end:
a stage that waited for another one inside its backward pass would wait for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalign.parallel.grid import Grid
from megalign.parallel.placement import FINAL_HOOK, HOOK, Placement

BUCKET_BYTES = 32 * 2**20


@dataclass(eq=False)
class Bucket:
    """Parameters whose gradients travel together over one group."""

    parameters: list[torch.nn.Parameter]
    names: list[str]
    group: Any
    mean: bool
    dtype: torch.dtype | None = None  # of the message; None: that of the gradients
    calls: dict[int, int] = field(default_factory=dict)  # parameter -> gradients that arrived in the last microbatch
    expected: dict[int, int] | None = None  # the same of an earlier step: when the last has arrived, the bucket goes out
    flat: Tensor | None = None
    work: Any = None
    done: bool = False
    bytes: int = 0  # handed to collectives so far

    def arrived(self, parameter: torch.nn.Parameter) -> None:
        """Count a gradient; the last one sends the bucket out."""
        key = id(parameter)
        self.calls[key] = self.calls.get(key, 0) + 1
        if self.flat is not None or self.done:
            name = next(name for name, p in zip(self.names, self.parameters, strict=True) if p is parameter)
            raise RuntimeError(
                f"{name}: a gradient arrived after its reduction had begun. Each step must use it equally often; "
                "mark every microbatch but the last (no_sync)"
            )
        if self.calls == self.expected:
            self.send()

    def send(self) -> None:
        """Begin the all-reduce of what has been accumulated."""
        gradients = [gradient_of(p) for p in self.parameters]
        self.flat = torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in zip(self.parameters, gradients, strict=True)])
        if self.dtype is not None:
            self.flat = self.flat.to(self.dtype)
        self.bytes += self.flat.numel() * self.flat.element_size()
        self.work = dist.all_reduce(self.flat, group=self.group, async_op=True)

    def finish(self) -> None:
        """Wait, divide if it is a mean, write back; once a step, also for what backward left unsent."""
        if self.done:
            return
        if self.flat is None:
            self.send()
        assert self.flat is not None
        self.work.wait()
        if self.mean:
            self.flat.div_(self.group.size())
        for parameter, total in zip(self.parameters, self.flat.split([p.numel() for p in self.parameters]), strict=True):
            gradient = gradient_of(parameter)
            if gradient is None:  # a plain parameter that this rank did not use
                parameter.grad = total.view_as(parameter).to(parameter.dtype)
            else:
                gradient.copy_(total.view_as(parameter))
        self.flat = self.work = None
        self.done = True

    def reset(self) -> None:
        """A new step."""
        if self.calls:
            self.expected = self.calls
        self.calls, self.done, self.flat, self.work = {}, False, None, None


def gradient_of(parameter: torch.nn.Parameter) -> Tensor | None:
    """Where the gradient is accumulated: megatron's FP32 main gradient, or `.grad`."""
    main = getattr(parameter, "main_grad", None)
    return parameter.grad if main is None else main


def buckets_of(
    entries: Sequence[tuple[str, torch.nn.Parameter, bool]], group: Any, *, size: int = BUCKET_BYTES, dtype: torch.dtype | None = None
) -> list[Bucket]:
    """(name, parameter, mean) in the order of backward, cut into buckets of one kind and at most `size` bytes of FP32."""
    buckets: list[Bucket] = []
    room = 0
    for name, parameter, mean in entries:
        kind = (mean, getattr(parameter, "main_grad", parameter).dtype)
        last = buckets[-1] if buckets else None
        if last is None or room < 4 * parameter.numel() or kind != (last.mean, getattr(last.parameters[0], "main_grad", last.parameters[0]).dtype):
            last, room = Bucket([], [], group, mean, dtype), size
            buckets.append(last)
        last.parameters.append(parameter)
        last.names.append(name)
        room -= 4 * parameter.numel()
    return buckets


class PlainReduction:
    """Hooks on parameters without DDP: after `loss.backward()` their gradients are reduced."""

    def __init__(self, buckets: list[Bucket]):
        self.buckets = buckets
        self.synchronise, self.queued = True, False
        self.handles = []
        for bucket in buckets:
            bucket.expected = {id(p): 1 for p in bucket.parameters}
            for parameter in bucket.parameters:
                self.handles.append(parameter.register_post_accumulate_grad_hook(self._hook(bucket)))

    def _hook(self, bucket: Bucket) -> Callable[[Any], None]:
        def arrived(parameter: Any) -> None:
            if not self.synchronise:
                return
            if not self.queued:
                self.queued = True
                torch.autograd.Variable._execution_engine.queue_callback(self._finish)  # pyright: ignore[reportAttributeAccessIssue]
            bucket.arrived(parameter)

        return arrived

    def _finish(self) -> None:
        self.queued = False
        for bucket in self.buckets:
            bucket.finish()
        for bucket in self.buckets:
            expected = bucket.expected
            bucket.reset()
            bucket.expected = expected

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Only accumulate: for every microbatch but the last."""
        self.synchronise = False
        try:
            yield
        finally:
            self.synchronise = True

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()


def reduce_in_backward(
    parameters: Sequence[tuple[str, torch.nn.Parameter]], group: Any, *, mean: bool = False, fp32: bool = False, bucket_bytes: int = BUCKET_BYTES
) -> PlainReduction:
    """Add up (or average) over `group` the gradients of (name, parameter), in the backward pass, without DDP.

    For a module under expert parallelism whose other parameters are copies: router, norms, shared expert. Every rank of the
    group hands in the same parameters in the same order. fp32: the message is FP32 whatever the gradients are.
    """
    if group.size() == 1:
        return PlainReduction([])
    entries = [(name, p, mean) for name, p in reversed(list(parameters)) if p.requires_grad]
    return PlainReduction(buckets_of(entries, group, size=bucket_bytes, dtype=torch.float32 if fp32 else None))


class Reduction:
    """The hooks of a model under megatron's DDP."""

    def __init__(self) -> None:
        self.buckets: list[Bucket] = []
        self.final: list[tuple[Any, list[list[torch.nn.Parameter]]]] = []  # (group of stages, the copies on this rank of each parameter)
        self.accumulators: list[Any] = []
        self.final_bytes = 0

    @property
    def bytes(self) -> int:
        """Bytes handed to collectives so far."""
        return self.final_bytes + sum(bucket.bytes for bucket in self.buckets)

    def finish_stages(self) -> None:
        """Add up the copies of each parameter over its pipeline stages, virtual ones included; after all backward passes."""
        for group, parameters in self.final:
            sums = [torch.stack([gradient_of(copy) for copy in copies]).sum(0) for copies in parameters]  # pyright: ignore
            flat = torch.cat([total.reshape(-1) for total in sums])
            if group.size() > 1:
                dist.all_reduce(flat, group=group)
                self.final_bytes += flat.numel() * flat.element_size()
            for copies, total in zip(parameters, flat.split([s.numel() for s in sums]), strict=True):
                for copy in copies:
                    gradient_of(copy).copy_(total.view_as(copy))  # pyright: ignore


def attach(chunks: Sequence[Any], placements: Sequence[Placement], grid: Grid, *, bucket_bytes: int = BUCKET_BYTES) -> Reduction:
    """Hook the DDP-wrapped chunks: every axis of every placement whose reducer is ours (collective).

    Sets `no_sync_func` of their config, by which the schedule says which microbatch is the last.
    """
    reduction = Reduction()
    config = chunks[0].config
    mine = {axis: {id(p.parameter): p for p in placements if p.reducers.get(axis) == HOOK} for axis in ("tensor", "expert_tensor")}
    ranks = {axis: tuple(dist.get_process_group_ranks(getattr(grid, axis).group)) for axis in mine}
    stages = _stage_copies(placements, grid)
    # Communicators of their own: these messages pass those of the layers in between, in an order of their own.
    groups = new_groups([*(ranks[axis] for axis, held in mine.items() if held), *stages])
    for axis, held in mine.items():
        for chunk in chunks if held else ():
            for ddp_group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
                _attach_to(ddp_group, held, axis, groups[ranks[axis]], bucket_bytes, reduction)
    if reduction.buckets:
        no_sync = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
    if stages:
        reduction.final = [(groups[holders], list(copies.values())) for holders, copies in stages.items()]
        megatrons = config.finalize_model_grads_func

        def finalize(*args: Any, **kwargs: Any) -> None:
            megatrons(*args, **kwargs)
            reduction.finish_stages()

        config.finalize_model_grads_func = finalize
    return reduction


def new_groups(wanted: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], Any]:
    """A new process group for every tuple of ranks that any rank wants (collective); those of this rank."""
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, list(wanted))
    # Not use_local_synchronization: it names a group by its ranks, so a second one of the same ranks meets the first one's keys.
    return {ranks: dist.new_group(list(ranks)) for ranks in sorted({ranks for asked in everywhere for ranks in asked})}


def _attach_to(ddp_group: Any, mine: dict[int, Placement], axis: str, group: Any, bucket_bytes: int, reduction: Reduction) -> None:
    """Our buckets inside one of DDP's."""
    held = [mine[id(p)] for bucket in ddp_group.buckets for p in bucket.params_list if id(p) in mine]
    if not held:
        return
    buckets = buckets_of([(p.name, p.parameter, p.gradients[axis] == "duplicated") for p in held], group, size=bucket_bytes)
    reduction.buckets += buckets
    for bucket in buckets:
        for parameter in bucket.parameters:
            accumulator: Any = parameter.expand_as(parameter).grad_fn.next_functions[0][0]  # pyright: ignore[reportOptionalMemberAccess]
            # After DDP's hook on the same node: the main gradient then has this microbatch's part.
            accumulator.register_hook(_when_last(ddp_group, bucket, parameter))
            reduction.accumulators.append(accumulator)
    start, reset = ddp_group.start_grad_sync, ddp_group.reset

    def start_grad_sync(*args: Any, **kwargs: Any) -> None:
        for bucket in buckets:
            bucket.finish()
        start(*args, **kwargs)

    def reset_both() -> None:
        for bucket in buckets:
            bucket.reset()
        reset()

    ddp_group.start_grad_sync, ddp_group.reset = start_grad_sync, reset_both


def _when_last(ddp_group: Any, bucket: Bucket, parameter: torch.nn.Parameter) -> Callable[..., None]:
    def hook(*unused: Any) -> None:
        if not ddp_group.is_last_microbatch:
            return
        if bucket.done:  # it was the last one that DDP's bucket waited for, and went with it
            bucket.calls[id(parameter)] = bucket.calls.get(id(parameter), 0) + 1
        else:
            bucket.arrived(parameter)

    return hook


def _stage_copies(placements: Sequence[Placement], grid: Grid) -> dict[tuple[int, ...], dict[str, list[torch.nn.Parameter]]]:
    """Ranks that hold copies on their stages -> name -> the copies of this rank; in the same order on all of them."""
    ranks = dist.get_process_group_ranks(grid.pipeline.group)
    copies: dict[tuple[int, ...], dict[str, list[torch.nn.Parameter]]] = {}
    for p in sorted(placements, key=lambda p: (p.stages, p.name)):
        if p.reducers.get("pipeline") == FINAL_HOOK:
            copies.setdefault(tuple(ranks[stage] for stage in p.stages), {}).setdefault(p.name, []).append(p.parameter)
    return copies

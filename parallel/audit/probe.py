"""What no comparison of copies can see: all of them agree on the wrong gradient.

On an FP64 copy of the model, wrapped, hooked and reduced like the model itself, each class of placements is pushed along
random directions v, the same on all copies, and the loss's central difference held against the gradient:

    (L(w + s v) - L(w - s v)) / 2 s   =   g . v

A sum where a mean belongs, a reduction done twice, over the wrong group or not at all, a lost factor: each shows as a ratio.
FP64, because the difference of two losses in FP32 has no digits left. What is off is looked for again name by name.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalign.parallel.audit import findings as f
from megalign.parallel.audit.findings import Finding
from megalign.parallel.audit.held import Held
from megalign.parallel.grid import Grid
from megalign.parallel.init import device
from megalign.parallel.placement import Placement

DIRECTIONS = 2
TOLERANCE = 0.01  # of the class's gradient norm
FLOOR = 1e-6  # of the whole gradient's norm: what is smaller than this is rounding
FURTHEST = 100.0  # times as far as others a kind of small gradient is pushed

# (backward too?) -> the loss that the whole world trains on, the same on every rank
Loss = Callable[[bool], float]


def probe(chunks: Sequence[Any], held: Sequence[Held], placements: Sequence[Placement], loss: Loss, grid: Grid) -> list[Finding]:
    """Findings of a model in FP64 under DDP with its hooks (collective). loss: runs it; True: and leaves main gradients.

    Raises RuntimeError if the routers choose other experts at every step size.
    """
    kept = [buffer.clone() for chunk in chunks for buffer in chunk.module.buffers()]
    routing = _Routing(chunks)
    for chunk in chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    loss(True)
    for buffer, value in zip((b for chunk in chunks for b in chunk.module.buffers()), kept, strict=True):
        buffer.copy_(value)  # the expert bias has been updated
    problem = _Problem(held, loss, routing, grid)
    whole = problem.gradient_norm(None)
    by_class: dict[str, set[str]] = {}
    for p in placements:
        if p.parameter.requires_grad:
            by_class.setdefault(_class_of(p), set()).add(_kind(p.name))
    findings = []
    placed = {_kind(p.name): p for p in placements}
    for members in _everywhere(by_class):
        ratio = problem.ratio(members, whole)
        if ratio is None:
            continue
        alone = [(kind, problem.ratio({kind}, whole)) for kind in sorted(members)] if len(members) > 1 else [(next(iter(members)), ratio)]
        for kind, found in alone:
            if found is not None:
                findings.append(_finding(kind, found, _described(placed.get(kind)), grid))
    return findings


class _Problem:
    """A loss as a function of parameters chosen by kind."""

    def __init__(self, held: Sequence[Held], loss: Loss, routing: _Routing, grid: Grid):
        self.loss, self.routing, self.grid = loss, routing, grid
        self.weights: dict[str, float] = {}  # of the kinds that are pushed
        self.held = [h for h in held if not h.is_buffer and h.tensor.requires_grad and getattr(h.tensor, "main_grad", None) is not None]
        keys: list[Any] = [None] * grid.world
        dist.all_gather_object(keys, [h.key for h in self.held])
        owner: dict[str, int] = {}
        for rank, found in enumerate(keys):
            for key in found:
                owner.setdefault(key, rank)
        seen: set[str] = set()
        self.owned = [h for h in self.held if owner[h.key] == grid.rank and not (h.key in seen or seen.add(h.key))]

    def gradient_norm(self, kinds: set[str] | None) -> float:
        """Norm of the gradient of these kinds, each logical element once."""
        return self._total(h.tensor.main_grad.square().sum() for h in self._of(self.owned, kinds)) ** 0.5  # pyright: ignore

    def ratio(self, kinds: set[str], whole: float) -> tuple[float, float] | None:
        """None if gradient and loss agree; else (true / found along the gradient's part, what remains unexplained, 0 to 1)."""
        pairs = []
        norms = {kind: self.gradient_norm({kind}) for kind in sorted(kinds)}
        self.weights = {kind: self._weight(norm, max(norms.values())) for kind, norm in norms.items()}
        norm = sum((self.weights[kind] * norm) ** 2 for kind, norm in norms.items()) ** 0.5
        rms = (self._total(h.tensor.detach().square().sum() for h in self._of(self.owned, kinds)) / max(1.0, self._total(torch.tensor(float(h.tensor.numel())) for h in self._of(self.owned, kinds)))) ** 0.5
        for number in range(DIRECTIONS):
            along = self._total(self.weights[_kind(h.key)] * (h.tensor.main_grad * _direction(h, number)).sum() for h in self._of(self.owned, kinds))  # pyright: ignore
            pairs.append((self._difference(kinds, number, max(rms, 1e-2)), along))
        if max(abs(true - found) for true, found in pairs) <= TOLERANCE * norm + FLOOR * whole:
            return None
        square = sum(found * found for _, found in pairs)
        ratio = sum(true * found for true, found in pairs) / square if square else float("inf")
        rest = sum((true - ratio * found) ** 2 for true, found in pairs) if square else 0.0
        return ratio, (rest / max(sum(true * true for true, _ in pairs), 1e-300)) ** 0.5

    @staticmethod
    def _weight(norm: float, largest: float) -> float:
        """How much further a kind is pushed than that of the largest gradient in its class, in whose shadow it could be wrong unseen."""
        return min(largest / max(norm, 1e-300), FURTHEST)

    def _difference(self, kinds: set[str], number: int, rms: float) -> float:
        for relative in (1e-5, 1e-6, 1e-7, 1e-8):
            size, losses, choices = relative * rms, [], []
            for sign in (1, -1):
                self._push(kinds, number, sign * size)
                self.routing.start()
                with torch.no_grad():
                    losses.append(self.loss(False))
                choices.append(self.routing.choices)
                self._push(kinds, number, -sign * size)
            moved = torch.tensor([float(choices[0] != choices[1])], device=device())
            dist.all_reduce(moved, op=dist.ReduceOp.MAX)
            if not moved.item():
                return (losses[0] - losses[1]) / (2 * size)
        raise RuntimeError("audit.probe: routers choose other experts even for changes of 1e-8; probe with another train.seed")

    @torch.no_grad()
    def _push(self, kinds: set[str], number: int, size: float) -> None:
        for h in self._of(self.held, kinds):
            h.tensor.add_(_direction(h, number), alpha=size * self.weights[_kind(h.key)])

    @staticmethod
    def _of(held: Sequence[Held], kinds: set[str] | None) -> list[Held]:
        return [h for h in held if kinds is None or _kind(h.key) in kinds]

    def _total(self, parts: Iterator[Tensor]) -> float:
        total = torch.zeros(1, dtype=torch.float64, device=device())
        for part in parts:
            total += part.to(total.device)
        dist.all_reduce(total)
        return total.item()


class _Routing:
    """Fingerprints of what the routers chose since `start`."""

    def __init__(self, chunks: Sequence[Any]):
        self.choices: list[int] = []
        for chunk in chunks:
            for module in chunk.modules():
                if type(module).__name__ == "TopKRouter":
                    module.register_forward_hook(self._note)

    def start(self) -> None:
        self.choices = []

    def _note(self, module: Any, inputs: Any, output: Any) -> None:
        chosen = output[1].reshape(-1).to(torch.int64)
        self.choices.append(int((chosen * torch.arange(1, len(chosen) + 1, device=chosen.device)).sum()))


def in_double(models: Sequence[Any], grid: Grid) -> list[Any]:
    """An FP64 copy of unwrapped chunks: without dropout, jitter, capacity and auxiliary losses, which are not in the loss."""
    config = copy.copy(models[0].config)
    changes: dict[str, Any] = dict(
        params_dtype=torch.float64, pipeline_dtype=torch.float64, bf16=False, fp16=False, hidden_dropout=0.0, attention_dropout=0.0,
        moe_router_load_balancing_type="none", moe_aux_loss_coeff=0.0, moe_z_loss_coeff=None, moe_input_jitter_eps=None,
        moe_expert_capacity_factor=None, moe_router_dtype="fp64", moe_router_bias_update_rate=0.0, timers=None, recompute_granularity=None,
        finalize_model_grads_func=None, no_sync_func=None, grad_sync_func=None, param_sync_func=None,
    )  # fmt: skip
    for name, value in changes.items():
        setattr(config, name, value)
    memo: dict[int, Any] = {id(group): group for group in vars(grid.process_groups).values()}
    memo |= {id(grid.process_groups): grid.process_groups, id(models[0].config): config}
    copies = copy.deepcopy(list(models), memo)
    for model, double in zip(models, copies, strict=True):
        double.double()
        for module in double.modules():
            _one_after_the_other(module)
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if type(module).__name__ == "TopKRouter":
                setattr(module, "routing_type", "none")  # noqa: B010  (pyright knows modules by tensors alone)
        for old, new in zip(model.parameters(), double.parameters(), strict=True):  # a copied Parameter loses its attributes
            for name, value in vars(old).items():
                if not name.startswith(("main_", "grad_", "_")):
                    setattr(new, name, value)
    return copies


def _one_after_the_other(module: Any) -> None:
    """Grouped experts to SequentialMLP, of which they are a faster spelling: no grouped matmul takes FP64."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.moe.experts import SequentialMLP

    from megalign.parallel.lora import Adapted, adapted

    if type(module).__name__ == "GroupedExperts":
        module.__class__ = SequentialMLP
        for expert in module.local_experts:
            linear: Any
            for linear, kind in ((expert.linear_fc1, ColumnParallelLinear), (expert.linear_fc2, RowParallelLinear)):
                linear.__class__ = adapted(kind) if isinstance(linear, Adapted) else kind  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def kept_in_double() -> Iterator[None]:
    """`.float()` and the routers' FP32 softmax leave FP64 as it is (moe_utils.py:711-717)."""
    from megatron.core.transformer.moe import moe_utils

    original, seen = torch.Tensor.float, moe_utils.torch

    class Wide:
        float32 = torch.float64

        def __getattr__(self, name: str) -> Any:
            return getattr(seen, name)

    torch.Tensor.float = lambda self, *args, **kwargs: self if self.dtype == torch.float64 else original(self, *args, **kwargs)  # pyright: ignore
    moe_utils.torch = Wide()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        torch.Tensor.float = original  # pyright: ignore[reportAttributeAccessIssue]
        moe_utils.torch = seen


def _direction(held: Held, number: int) -> Tensor:
    """Normal(0, 1), the same for all copies: drawn by key."""
    seed = int.from_bytes(hashlib.sha256(f"{number}/{held.key}".encode()).digest()[:7], "big")
    return torch.randn(held.tensor.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(held.tensor.device)


def _kind(name: str) -> str:
    """Of a name or a key, whose copies under other names (a tied table's) have the same."""
    return re.sub(r"\.\d+\.", ".*.", name.split("|")[0])


def _class_of(p: Placement) -> str:
    return str((p.shard, sorted(p.gradients.items()), sorted(p.reducers.items())))


def _everywhere(by_class: dict[str, set[str]]) -> list[set[str]]:
    """The classes of all ranks with all their members, in one order (collective)."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, {name: sorted(kinds) for name, kinds in by_class.items()})
    merged: dict[str, set[str]] = {}
    for classes in found:
        for name, kinds in classes.items():
            merged.setdefault(name, set()).update(kinds)
    # A kind that is in two classes (an embedding's copy on the last stage) moves as a whole.
    return [merged[name] for name in sorted(merged)]


def _described(placement: Placement | None) -> str | None:
    found: list[Any] = [None] * dist.get_world_size()
    mine = None if placement is None else "; ".join(f"{axis}: {gradient} ({placement.reducers[axis]})" for axis, gradient in placement.gradients.items())
    dist.all_gather_object(found, mine)
    return next((text for text in found if text), None)


def _finding(kind: str, found: tuple[float, float], said: str | None, grid: Grid) -> Finding:
    ratio, rest = found
    sizes = {name: axis.size for name, axis in (("tensor", grid.tensor), ("pipeline", grid.pipeline), ("data_context", grid.data_context), ("expert", grid.expert), ("expert_tensor", grid.expert_tensor), ("expert_data", grid.expert_data)) if axis.size > 1}
    detail = f"loss says {ratio:.3g} times the gradient; placed as {said}"
    if rest > 0.02 or ratio <= 0:
        fix = "look at what its layer does in backward: parts of the gradient never reach the reduction, or come from other ranks' copies"
        return Finding(kind, f.WRONG, fix, detail=detail)
    off = ratio if ratio > 1 else 1 / ratio
    group = "/".join(name for name, size in sizes.items() if abs(size - off) < 0.02 * off)
    axis = group.split("/")[0] or "the axis"
    if ratio > 1:
        fix = f'add it up over {axis}: declare(parameter, {axis}="partial"), in the place of a mean or of a lost factor {off:.3g}'
        return Finding(kind, f.TOO_SMALL, fix, group, detail=detail)
    fix = f'reduce it once: "full" if every {axis} rank has the whole, "duplicated" for a mean; and by one reducer only'
    return Finding(kind, f.TOO_LARGE, fix, group, detail=detail)

"""The FP8 operations as the rest of megalign calls them, and which implementation each of them takes.

The ladder, from what runs everywhere to what is fastest where it runs:

    reference   torch, any device                                   every operation
    triton      kernels/quantise.py, matmul.py, wgrad.py            Hopper; every operation, any shape
    scaled_mm   torch._scaled_mm (cuBLASLt)                         Hopper, CUDA >= 12.9; matmul and wgrad of some shapes
    gluon       kernels/gluon_matmul.py, warp-specialised           Hopper, Triton >= 3.6; matmul

On a CPU the reference is taken. On CUDA a matmul of a new shape is measured once with every rung and configuration
that the machine has, on random operands and after a comparison with the reference; the fastest is kept in a table
(tuning.py). M is rounded up to a power of two for that, 65,536 at most, so that batches of many lengths share a row. Where nothing
can be measured (a CUDA graph is being captured, MEGALIGN_FP8_TUNE=0, no memory for the operands) the first Triton configuration is taken.

`use(name)` (a recipe's kernels.fp8_backend) or MEGALIGN_FP8_BACKEND forces a rung: operations and shapes that it lacks take the next one down, and a
machine that lacks it is an error. `precision` says where FP8 does not pay and BF16 is faster.
`megalign kernels` prints all of it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megalign.kernels import fused, reference, scaled_mm, tuning
from megalign.kernels.groups import GroupLayout
from megalign.kernels.tiles import Fp8Error, Fp8Tensor

Operation = Literal["matmul", "wgrad", "grouped_matmul", "grouped_wgrad"]
LADDER = ("reference", "triton", "scaled_mm", "gluon")
OPERATIONS: tuple[Operation, ...] = ("matmul", "wgrad", "grouped_matmul", "grouped_wgrad")
LARGEST_TUNED = 65536  # tokens: beyond, time is in proportion to them
TUNED = ("matmul", "wgrad")  # groups differ in every step: they take the configuration of the large shapes

_forced: str | None = None
_rows: dict[tuple[str, int | None], dict[str, tuning.Row]] = {}
_taken: dict[tuple[Any, ...], Callable[..., Tensor]] = {}  # a choice looks at machine, environment and table; a step may not


def use(backend: str | None) -> None:
    """Force a rung for this process (configuration), or None: choose. Over MEGALIGN_FP8_BACKEND."""
    global _forced
    if backend not in (None, "auto", *LADDER):
        raise Fp8Error(f"fp8 backend {backend!r} is unknown; it is auto or one of {', '.join(LADDER)}")
    _forced = None if backend == "auto" else backend


def forced() -> str | None:
    """The rung that is forced, by `use` or by MEGALIGN_FP8_BACKEND."""
    given = _forced or os.environ.get("MEGALIGN_FP8_BACKEND", "auto")
    if given not in ("auto", *LADDER):
        raise Fp8Error(f"MEGALIGN_FP8_BACKEND={given} is unknown; it is auto or one of {', '.join(LADDER)}")
    return None if given == "auto" else given


def why_not(backend: str, device: torch.device) -> str | None:
    """Why this machine cannot run a rung on `device`; None: it can."""
    if backend == "reference":
        return None
    if backend in ("triton", "gluon") and importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type != "cuda":
        interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else f"it needs CUDA, the device is {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] < 9 or (backend != "triton" and capability != (9, 0)):
        return f"it needs Hopper (sm_90), the device is sm_{capability[0]}{capability[1]}"
    if backend == "scaled_mm" and tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2]) < (12, 9):
        return f"torch was built for CUDA {torch.version.cuda}, block-wise scaling needs 12.9"
    if backend == "gluon" and importlib.util.find_spec("triton.experimental.gluon") is None:
        return "this Triton has no Gluon (3.6 has)"
    return None


def lacks(backend: str, operation: Operation, m: int, n: int, k: int) -> str | None:
    """Why a rung does not have an operation for y [m, n] over k (or dW [n, k] over m); None: it has."""
    if backend == "scaled_mm":
        return scaled_mm.why_not(operation, m, n, k)
    return None if backend != "gluon" or operation == "matmul" else f"gluon has no {operation}"


@dataclass(frozen=True)
class Choice:
    """A rung and a configuration of it; `source`: forced, device, measured or default."""

    backend: str
    config: int
    source: str

    def __str__(self) -> str:
        return f"{self.backend}:{self.config}" if self.backend in ("triton", "gluon") else self.backend


def _parse(name: str, source: str) -> Choice:
    backend, _, config = name.partition(":")
    return Choice(backend, int(config or 0), source)


def choose(operation: Operation, m: int, n: int, k: int, device: torch.device, dtype: torch.dtype = torch.bfloat16, adds: bool = False) -> Choice:
    """The rung and configuration for y [m, n] over k, or dW [n, k] over m tokens; measures if the shape is new.

    adds: dW is added to a main gradient of this dtype, for which some rungs need a temporary.
    Raises Fp8Error if a rung is forced that this machine lacks.
    """
    wanted = forced()
    if wanted:
        reason = why_not(wanted, device)
        if reason:
            raise Fp8Error(f"fp8 backend {wanted} is forced, but {reason}; force another or none")
        for backend in reversed(LADDER[: LADDER.index(wanted) + 1]):
            if why_not(backend, device) is None and lacks(backend, operation, m, n, k) is None:
                return Choice(backend, 0, "forced" if backend == wanted else f"forced {wanted} lacks it")
    if device.type != "cuda" or why_not("triton", device):
        return Choice("reference", 0, "device")
    if operation in TUNED:
        row = measured(operation, m, n, k, device, dtype, adds)
        # The row is that of M rounded up; what a rung can take depends on M itself.
        for name in sorted(row.seconds, key=row.seconds.__getitem__) if row else []:
            if lacks(name.partition(":")[0], operation, m, n, k) is None:
                return _parse(name, "measured")
        if row and not row.seconds:
            return Choice("reference", 0, "measured")
    return Choice("triton", 0, "default")


def key(operation: str, m: int, n: int, k: int, dtype: torch.dtype, adds: bool = False) -> str:
    """Name of a row: M rounded up to a power of two, 64 to 65,536."""
    kind = str(dtype).removeprefix("torch.") + (" added" if adds else "")
    return f"{operation} {min(max(64, 1 << max(m - 1, 0).bit_length()), LARGEST_TUNED)} {n} {k} {kind}"


def measured(operation: Operation, m: int, n: int, k: int, device: torch.device, dtype: torch.dtype, adds: bool = False) -> tuning.Row | None:
    """The table's row for a shape, measured now if it is new and may be; None if it may not."""
    place = (device.type, device.index)
    if place not in _rows:
        _rows[place] = tuning.load(tuning.table_path(device), device)
    name = key(operation, m, n, k, dtype, adds)
    row = _rows[place].get(name)
    if row is None or not row.seconds.keys() <= known(device):  # new, or of another version
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if os.environ.get("MEGALIGN_FP8_TUNE") == "0" or capturing or torch.compiler.is_compiling():
            return None
        try:
            _rows[place][name] = tune(operation, int(name.split()[1]), n, k, device, dtype, tuning.cuda_seconds, adds)
        except torch.OutOfMemoryError:  # the model fills the device: a choice is no reason to end a run
            return None
        if _rows[place][name].seconds:  # that nothing works here is not for every later process to inherit
            tuning.save(tuning.table_path(device), device, {name: _rows[place][name]})
    return _rows[place][name]


def candidates(operation: Operation, m: int, n: int, k: int, device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """Every way this machine has for a shape: "triton:1" -> function of the operation's arguments."""
    found: dict[str, Callable[..., Tensor]] = {}
    for backend in LADDER[1:]:
        if why_not(backend, device) is None and lacks(backend, operation, m, n, k) is None:
            found |= {f"{backend}:{i}": run for i, run in enumerate(_configured(backend, operation))}
    return found


@functools.cache
def known(device: torch.device) -> frozenset[str]:
    """The names that rows of this machine may hold."""
    pairs = ((b, o) for b in LADDER if why_not(b, device) is None for o in OPERATIONS if b != "gluon" or o == "matmul")
    return frozenset(f"{b}:{i}" for b, o in pairs if b != "scaled_mm" or o in TUNED for i in range(len(_configured(b, o))))


@functools.cache
def _configured(backend: str, operation: Operation) -> list[Callable[..., Tensor]]:
    """The implementations of a rung, one for each of its configurations."""
    if backend == "reference":
        return [getattr(reference, operation)]
    if backend == "scaled_mm":
        return [getattr(scaled_mm, operation)]
    if backend == "gluon":
        from megalign.kernels import gluon_matmul as module
    elif operation.endswith("matmul"):
        from megalign.kernels import matmul as module
    else:
        from megalign.kernels import wgrad as module
    return [functools.partial(getattr(module, operation), config=config) for config in module.CONFIGS]


def tune(operation: Operation, m: int, n: int, k: int, device: torch.device, dtype: torch.dtype, timer: tuning.Timer, adds: bool = False) -> tuning.Row:
    """Compare and time every candidate of a shape, as it is used. The comparison takes at most 384 of the M rows."""
    ways = candidates(operation, m, n, k, device)
    main = torch.zeros(n, k, dtype=dtype, device=device) if adds else None
    with torch.no_grad():
        small, large = (_operands(operation, size, n, k, device) for size in (min(m, 384), m))
        return tuning.measure(
            {name: functools.partial(run, *large, *([] if main is None else [main]), dtype=dtype) for name, run in ways.items()},
            {name: lambda run=run: run(*small, *([] if main is None else [torch.zeros_like(main)]), dtype=dtype) for name, run in ways.items()},
            functools.partial(getattr(reference, operation), *small, dtype=dtype),
            timer,
        )


def _operands(operation: Operation, m: int, n: int, k: int, device: torch.device) -> tuple[Fp8Tensor, Fp8Tensor]:
    own = torch.Generator(device)  # a run draws the same numbers whether a shape is measured or remembered
    own.seed()

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16, generator=own)

    if operation == "matmul":
        return quantise_rows(normal(m, k)), quantise_blocks(normal(n, k))
    return quantise_rows_both(normal(m, n))[1], quantise_rows_both(normal(m, k))[1]


def precision(m: int, n: int, k: int, device: torch.device) -> Literal["fp8", "bf16"]:
    """Whether the three matmuls of a linear layer W [n, k] on m tokens are worth FP8, its quantisation included.

    On Hopper BF16 wins while W has fewer than 2048^2 numbers and m < 4096 (fp8.md: reading and writing the tiles costs
    more than the matmul gains). A CPU, and a rung that is forced, take FP8: there the numbers are what is wanted.
    """
    small = n * k < 2048**2 and m < 4096
    return "bf16" if device.type == "cuda" and forced() is None and small else "fp8"


def _quantiser(device: torch.device) -> Any:
    return _quantiser_of(device, forced(), os.environ.get("TRITON_INTERPRET"))


@functools.cache
def _quantiser_of(device: torch.device, wanted: str | None, _interpreted: str | None) -> Any:
    if wanted and why_not(wanted, device):
        raise Fp8Error(f"fp8 backend {wanted} is forced, but {why_not(wanted, device)}; force another or none")
    if wanted == "reference" or why_not("triton", device) or (device.type != "cuda" and wanted is None):
        return reference
    from megalign.kernels import quantise

    return quantise


def quantise_rows(x: Tensor, *, power_of_two: bool = True) -> Fp8Tensor:
    """Activations x [M, K] in tiles of 1 x 128; power_of_two=False: FP32 scales amax / 448, for comparison with other stacks."""
    return _quantiser(x.device).quantise_rows(x, power_of_two=power_of_two)


def quantise_rows_both(x: Tensor, *, power_of_two: bool = True) -> tuple[Fp8Tensor, Fp8Tensor]:
    """(x [M, K], x^T [K, M]), each in tiles of 1 x 128."""
    return _quantiser(x.device).quantise_rows_both(x, power_of_two=power_of_two)


def quantise_blocks(w: Tensor, *, power_of_two: bool = True) -> Fp8Tensor:
    """Weights w [N, K] or [G, N, K] in blocks of 128 x 128."""
    return _quantiser(w.device).quantise_blocks(w, power_of_two=power_of_two)


def quantise_blocks_both(w: Tensor, *, power_of_two: bool = True) -> tuple[Fp8Tensor, Fp8Tensor]:
    """(W [.., N, K], W^T [.., K, N]) in blocks of 128 x 128."""
    return _quantiser(w.device).quantise_blocks_both(w, power_of_two=power_of_two)


def retile(x: Fp8Tensor) -> Fp8Tensor:
    """x [M, K] in tiles of 1 x 128 -> x^T [K, M] in tiles of 1 x 128."""
    return _quantiser(x.device).retile(x)


def _fused(device: torch.device) -> Any:
    """Norm and SwiGLU by the rung that quantises."""
    if _quantiser(device) is reference:
        return fused
    from megalign.kernels import fused_triton

    return fused_triton


def rms_norm_quantise(x: Tensor, gamma: Tensor, eps: float = 1e-5) -> tuple[Fp8Tensor, Fp8Tensor, Tensor]:
    """(y [M, K], y^T [K, M], 1 / rms [M]) of y = x / rms(x) * gamma, each FP8 layout in tiles of 1 x 128."""
    return _fused(x.device).rms_norm_quantise(x, gamma, eps)


def swiglu_quantise(h: Tensor) -> tuple[Fp8Tensor, Fp8Tensor]:
    """(a [M, F], a^T [F, M]) of a = silu(gate) * up, h = [gate, up] [M, 2F]."""
    return _fused(h.device).swiglu_quantise(h)


def swiglu_quantise_backward(h: Tensor, da: Tensor) -> tuple[Fp8Tensor, Fp8Tensor]:
    """(dh [M, 2F], dh^T [2F, M]) of h [M, 2F] and the gradient da [M, F] of a."""
    return _fused(h.device).swiglu_quantise_backward(h, da)


def matmul(x: Fp8Tensor, w: Fp8Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """y [M, N] = x [M, K] w[N, K]^T: forward with (x, W), dgrad with (dy, W^T)."""
    return _take("matmul", x.rows, w.rows, x.columns, x.device, dtype)(x, w, dtype=dtype)


def wgrad(dy_t: Fp8Tensor, x_t: Fp8Tensor, out: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """dW [N, K] = dy^T [N, M] x^T[K, M]^T, added in FP32 to `out` (FP32 or BF16) in place if it is given."""
    return _take("wgrad", dy_t.columns, dy_t.rows, x_t.rows, dy_t.device, dtype if out is None else out.dtype, out is not None)(dy_t, x_t, out, dtype=dtype)


def grouped_matmul(x: Fp8Tensor, w: Fp8Tensor, layout: GroupLayout, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """y [R', N]: rows of each expert of padded x [R', K] times its w[g] [N, K]^T."""
    return _take("grouped_matmul", x.rows, w.rows, x.columns, x.device, dtype)(x, w, layout, dtype=dtype)


def grouped_wgrad(
    dy_t: Fp8Tensor, x_t: Fp8Tensor, layout: GroupLayout, out: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """dW [G, N, K] over the tokens of each expert, added to `out` in place if it is given."""
    return _take("grouped_wgrad", dy_t.columns, dy_t.rows, x_t.rows, dy_t.device, dtype)(dy_t, x_t, layout, out, dtype=dtype)


def _take(operation: Operation, m: int, n: int, k: int, device: torch.device, dtype: torch.dtype, adds: bool = False) -> Callable[..., Tensor]:
    asked = (operation, m, n, k, device, dtype, adds, forced())
    run = _taken.get(asked)
    if run is None:
        choice = choose(operation, m, n, k, device, dtype, adds)
        run = _configured(choice.backend, operation)[choice.config]
        if choice.source != "default" or operation not in TUNED:  # a default may be measured later
            _taken[asked] = run
    return run

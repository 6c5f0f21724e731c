"""Triton's interpreter with the conversions and dots of the hardware.

The stock interpreter (3.6 to 3.9) runs kernels on the CPU with silently wrong numbers: float32 -> e4m3 loses the carry of
the mantissa, float32 -> bfloat16 truncates, and a dot of bfloat16 multiplies the bit patterns as integers. `install`
replaces the two functions that do it: conversions go through torch (to nearest, ties to even; FP8 saturates, as
cvt.rn.satfinite does), and dots widen their operands to float32 first. test_exact_interpreter.py asserts both.

What stays wrong, so that no kernel may do it: arithmetic on bfloat16 and FP8 values other than a conversion or a dot.
`record_launches` lists which kernels were launched, so that a test can tell a kernel from its reference.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

TORCH = {
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
}
BITS = {8: torch.uint8, 16: torch.uint16, 32: torch.uint32, 64: torch.uint64}
stock_convert_float = interpreter._convert_float
stock_create_dot = interpreter.InterpreterBuilder.create_dot


def convert_float(values: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
    """The bits of `values` (bits or numbers of Triton type `source`) as `target`, in the interpreter's convention."""
    if source not in TORCH or target not in TORCH or rounding == interpreter._ir.ROUNDING_MODE.RTZ:
        return stock_convert_float(values, source, target, rounding)
    flat = torch.from_numpy(np.array(values).reshape(-1).view(f"uint{source.primitive_bitwidth}")).view(TORCH[source])
    if target in (tl.float8e4nv, tl.float8e5):
        largest = torch.finfo(TORCH[target]).max
        flat = flat.to(torch.promote_types(TORCH[source], torch.float32) if source.primitive_bitwidth > 8 else torch.float32)
        flat = flat.clamp(-largest, largest)  # keeps NaN
    return flat.to(TORCH[target]).view(BITS[target.primitive_bitwidth]).numpy().reshape(values.shape)


def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    """a b + d with operands widened to float32; sums are numpy's, in the accumulator's type."""

    def wide(operand: Any) -> np.ndarray:
        kind = operand.dtype.scalar
        narrow = kind in (tl.bfloat16, tl.float8e4nv, tl.float8e5)
        return convert_float(operand.data, kind, tl.float32, None).view(np.float32) if narrow else operand.data

    product = np.matmul(wide(a), wide(b), dtype=d.data.dtype) + d.data
    return interpreter.TensorHandle(product, d.dtype.scalar)


def install() -> None:
    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot


def source_of(function: Any) -> str:
    """Hash of the kernel's source: the same for the interpreted and for the compiled object of one function."""
    return hashlib.sha256(inspect.getsource(function.fn).encode()).hexdigest()[:16]


def name_of(function: Any) -> str:
    return f"{function.fn.__module__}:{function.fn.__qualname__}"


@dataclass(frozen=True)
class Launch:
    kernel: str  # module:function
    source: str  # hash
    constants: dict[str, Any]  # its constexpr arguments
    warps: int | None
    stages: int | None
    options: dict[str, Any]  # what else it tells the compiler


@contextlib.contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Every launch of an interpreted kernel inside the block, in order."""
    launches: list[Launch] = []
    run = interpreter.InterpretedFunction.run

    def recorded(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        parameters = inspect.signature(self.fn).parameters
        given = dict(zip(parameters, args)) | kwargs
        constants = {name: given.get(name, p.default) for name, p in parameters.items() if "constexpr" in str(p.annotation)}
        options = {name: value for name, value in kwargs.items() if name not in (*parameters, "num_warps", "num_stages")}
        launches.append(Launch(name_of(self), source_of(self), constants, kwargs.get("num_warps"), kwargs.get("num_stages"), options))
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    interpreter.InterpretedFunction.run = recorded
    try:
        yield launches
    finally:
        interpreter.InterpretedFunction.run = run

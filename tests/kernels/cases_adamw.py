"""Compile-ahead cases of kernels/adamw_triton.py."""

from __future__ import annotations

from ahead import Case

from megalign.kernels.adamw_triton import BLOCK, FLAT_WARPS, OPTIONS, TILE_WARPS

MODULE = "megalign.kernels.adamw_triton"
SCALARS = {name: "fp32" for name in ("beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "eps", "decay", "size", "root_correction")} | {"number": "i32", "key": "i32"}
FP8 = {"q_ptr": "*fp8e4nv", "q_scale_ptr": "*fp32", "qt_ptr": "*fp8e4nv", "qt_scale_ptr": "*fp32"}


def tensors(moment: str, gradient: str, parameter: str) -> dict[str, str]:
    return {"weight_ptr": "*fp32", "m_ptr": f"*{moment}", "v_ptr": f"*{moment}", "gradient_ptr": f"*{gradient}", "parameter_ptr": f"*{parameter}", "scale_ptr": "*fp32"}


def name_of(kind: str, moment: str, gradient: str, parameter: str) -> str:
    """BF16 gradients and parameters go without saying."""
    return f"adamw {kind}, {moment} moments" + "".join(f", {t} {what}" for t, what in ((gradient, "gradients"), (parameter, "parameters")) if t != "bf16")


def flat(moment: str, gradient: str = "bf16", parameter: str = "bf16") -> Case:
    read = tensors(moment, gradient, parameter)
    sizes = {name: "i32" for name in ("n", "place_offset", "columns", "row_stride", "start")}
    constants = {"HAS_MASTER": parameter != "fp32", "STOCHASTIC": moment == "bf16", "CONTIGUOUS": True, "BLOCK": BLOCK}
    arguments = {**read, **sizes, **SCALARS}
    return Case(name_of("flat", moment, gradient, parameter), f"{MODULE}:adamw_flat_kernel", arguments, constants, FLAT_WARPS, divisible=(*read, "n"), options=OPTIONS)


def tile(moment: str, gradient: str = "bf16", parameter: str = "bf16") -> Case:
    read = tensors(moment, gradient, parameter)
    sizes = {name: "i32" for name in ("N", "K", "place_offset", "row_stride")}
    constants = {"HAS_MASTER": parameter != "fp32", "STOCHASTIC": moment == "bf16"}
    arguments = {**read, **FP8, **sizes, **SCALARS}
    return Case(name_of("fp8", moment, gradient, parameter), f"{MODULE}:adamw_fp8_kernel", arguments, constants, TILE_WARPS, divisible=(*read, *FP8, "N", "K", "row_stride"), options=OPTIONS)


TYPES = (("bf16",), ("fp32",), ("bf16", "fp32"), ("fp32", "fp32", "fp32"))  # moments, gradients, parameters; the third: megatron's main gradients
CASES = [case(*types) for case in (flat, tile) for types in TYPES]

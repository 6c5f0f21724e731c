"""Compile-ahead cases of kernels/adamw_triton.py."""

from __future__ import annotations

from ahead import Case

from megalign.kernels.adamw_triton import BLOCK, FLAT_WARPS, OPTIONS, TILE_WARPS

MODULE = "megalign.kernels.adamw_triton"
SCALARS = {name: "fp32" for name in ("beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "eps", "decay", "size", "root_correction")} | {"number": "i32", "key": "i32"}
FP8 = {"q_ptr": "*fp8e4nv", "q_scale_ptr": "*fp32", "qt_ptr": "*fp8e4nv", "qt_scale_ptr": "*fp32"}


def tensors(moment: str) -> dict[str, str]:
    return {"weight_ptr": "*fp32", "m_ptr": f"*{moment}", "v_ptr": f"*{moment}", "gradient_ptr": "*bf16", "parameter_ptr": "*bf16", "scale_ptr": "*fp32"}


def flat(moment: str) -> Case:
    sizes = {name: "i32" for name in ("n", "place_offset", "columns", "row_stride", "start")}
    constants = {"HAS_MASTER": True, "STOCHASTIC": moment == "bf16", "CONTIGUOUS": True, "BLOCK": BLOCK}
    arguments = {**tensors(moment), **sizes, **SCALARS}
    return Case(f"adamw flat, {moment} moments", f"{MODULE}:adamw_flat_kernel", arguments, constants, FLAT_WARPS, divisible=(*tensors(moment), "n"), options=OPTIONS)


def tile(moment: str) -> Case:
    sizes = {name: "i32" for name in ("N", "K", "place_offset", "row_stride")}
    constants = {"HAS_MASTER": True, "STOCHASTIC": moment == "bf16"}
    arguments = {**tensors(moment), **FP8, **sizes, **SCALARS}
    return Case(f"adamw fp8, {moment} moments", f"{MODULE}:adamw_fp8_kernel", arguments, constants, TILE_WARPS, divisible=(*tensors(moment), *FP8, "N", "K", "row_stride"), options=OPTIONS)


CASES = [case(moment) for case in (flat, tile) for moment in ("bf16", "fp32")]

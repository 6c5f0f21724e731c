"""Compile-ahead cases of kernels/fused_triton.py."""

from __future__ import annotations

from ahead import Case

from megalign.kernels.fused_triton import NORM_ROWS, WARPS

MODULE = "megalign.kernels.fused_triton"
OUT = {"row_ptr": "*fp8e4nv", "row_scale_ptr": "*fp32", "column_ptr": "*fp8e4nv", "column_scale_ptr": "*fp32", "M": "i32"}

CASES = [
    Case("rms", f"{MODULE}:rms_kernel", {"x_ptr": "*bf16", "inverse_ptr": "*fp32", "M": "i32", "K": "i32", "eps": "fp32"}, {"ROWS": NORM_ROWS, "COLUMNS": 256}, WARPS),
    Case("rms quantise", f"{MODULE}:rms_quantise_kernel", {"x_ptr": "*bf16", "gamma_ptr": "*bf16", "inverse_ptr": "*fp32", **OUT, "K": "i32"}, {"TILE": 128}, WARPS),
    Case("swiglu", f"{MODULE}:swiglu_kernel", {"h_ptr": "*bf16", **OUT, "F": "i32"}, {"TILE": 128}, WARPS),
    Case("swiglu backward", f"{MODULE}:swiglu_backward_kernel", {"h_ptr": "*bf16", "da_ptr": "*bf16", **OUT, "F": "i32"}, {"TILE": 128}, WARPS),
]

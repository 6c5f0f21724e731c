"""Compile-ahead cases of kernels/quantise.py."""

from __future__ import annotations

from ahead import Case

from megalign.kernels.quantise import WARPS

MODULE = "megalign.kernels.quantise"
ROWS = {
    "row_ptr": "*fp8e4nv",
    "row_scale_ptr": "*fp32",
    "column_ptr": "*fp8e4nv",
    "column_scale_ptr": "*fp32",
    "M": "i32",
    "K": "i32",
    "x_stride": "i32",
}
BLOCKS = {"block_ptr": "*fp8e4nv", "block_scale_ptr": "*fp32", "transposed_ptr": "*fp8e4nv", "transposed_scale_ptr": "*fp32", "N": "i32", "K": "i32"}
RETILE = {"x_ptr": "*fp8e4nv", "x_scale_ptr": "*fp32", "column_ptr": "*fp8e4nv", "column_scale_ptr": "*fp32", "M": "i32", "K": "i32"}

CASES = [
    *(
        Case(
            f"quantise_rows {kind} columns={columns}{'' if power_of_two else ', fp32 scales'}",
            f"{MODULE}:quantise_rows_kernel",
            {"x_ptr": f"*{kind}", **ROWS},
            {"ROWS": True, "COLUMNS": columns, "POWER_OF_TWO": power_of_two, "TILE": 128},
            WARPS,
        )
        for kind, columns, power_of_two in (("bf16", False, True), ("bf16", True, True), ("fp32", True, True), ("bf16", True, False))
    ),
    *(
        Case(
            f"quantise_blocks {kind}{'' if power_of_two else ', fp32 scales'}",
            f"{MODULE}:quantise_blocks_kernel",
            {"w_ptr": f"*{kind}", **BLOCKS},
            {"TRANSPOSED": True, "POWER_OF_TWO": power_of_two, "TILE": 128},
            WARPS,
        )
        for kind, power_of_two in (("bf16", True), ("fp32", True), ("bf16", False))
    ),
    Case("retile", f"{MODULE}:retile_kernel", RETILE, {"TILE": 128}, WARPS),
]

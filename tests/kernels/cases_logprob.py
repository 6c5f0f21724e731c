"""Compile-ahead cases of kernels/logprob_triton.py."""

from __future__ import annotations

import torch
from ahead import Case

from megalign.kernels.logprob_triton import BLOCK_ROWS, BLOCKS

MODULE = "megalign.kernels.logprob_triton"
STATISTICS = {name: "*fp32" for name in ("maximum_ptr", "total_ptr", "own_ptr", "weighted_ptr")}
GRADIENT = {name: "*fp32" for name in ("log_z_ptr", "g_ptr", "h_ptr", "entropy_ptr")}
SIZES = {"N": "i32", "V": "i32", "D": "i32"}


def case(kernel: str, dtype: str, entropy: bool) -> Case:
    inputs = {"hidden_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}", "target_ptr": "*i64"}
    if kernel == "statistics_kernel":
        name, arguments = "log-prob statistics", {**inputs, **STATISTICS, **SIZES, "tiles_per_split": "i32"}
    else:
        name, arguments = "logit gradients", {**inputs, **GRADIENT, "gradient_ptr": f"*{dtype}", **SIZES, "stride": "i32"}
    columns, depth = BLOCKS[torch.float32 if dtype == "fp32" else torch.bfloat16]
    constants = {"ENTROPY": entropy, "ROWS": BLOCK_ROWS, "COLUMNS": columns, "DEPTH": depth, "PRECISION": "ieee" if dtype == "fp32" else "tf32"}
    divisible = tuple(a for a in arguments if a != "tiles_per_split")
    return Case(f"{name}{', entropy' * entropy}{', fp32' * (dtype == 'fp32')}", f"{MODULE}:{kernel}", arguments, constants, 8, 3, divisible)


CASES = [case(kernel, dtype, entropy) for dtype in ("bf16", "fp32") for kernel in ("statistics_kernel", "logit_gradients_kernel") for entropy in (False, True)]

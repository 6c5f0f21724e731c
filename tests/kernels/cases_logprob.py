"""Compile-ahead cases of kernels/logprob_triton.py."""

from __future__ import annotations

from ahead import Case

from megalign.kernels.logprob_triton import BLOCK_DEPTH, BLOCK_ROWS, BLOCK_VOCABULARY

MODULE = "megalign.kernels.logprob_triton"
INPUTS = {"hidden_ptr": "*bf16", "weight_ptr": "*bf16", "target_ptr": "*i64"}
STATISTICS = {name: "*fp32" for name in ("maximum_ptr", "total_ptr", "own_ptr", "weighted_ptr")}
GRADIENT = {name: "*fp32" for name in ("log_z_ptr", "g_ptr", "h_ptr", "entropy_ptr")} | {"gradient_ptr": "*bf16"}


def case(name: str, kernel: str, arguments: dict[str, str], entropy: bool) -> Case:
    constants = {"ENTROPY": entropy, "ROWS": BLOCK_ROWS, "COLUMNS": BLOCK_VOCABULARY, "DEPTH": BLOCK_DEPTH, "PRECISION": "tf32"}
    divisible = tuple(a for a in arguments if a != "tiles_per_split")
    return Case(f"{name}{', entropy' if entropy else ''}", f"{MODULE}:{kernel}", {**INPUTS, **arguments}, constants, 8, 3, (*INPUTS, *divisible))


SIZES = {"N": "i32", "V": "i32", "D": "i32"}
CASES = [
    *(case("log-prob statistics", "statistics_kernel", {**STATISTICS, **SIZES, "tiles_per_split": "i32"}, entropy) for entropy in (False, True)),
    *(case("logit gradients", "logit_gradients_kernel", {**GRADIENT, **SIZES, "stride": "i32"}, entropy) for entropy in (False, True)),
]

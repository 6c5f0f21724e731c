"""Compile-ahead cases of kernels/matmul.py and kernels/wgrad.py: every configuration the tuner may choose."""

from __future__ import annotations

from ahead import Case

from megalign.kernels import matmul, wgrad


def matmul_case(config: matmul.MatmulConfig, dtype: str, grouped: bool) -> Case:
    m, n, splits, warps, stages = config
    arguments = {
        "x_desc": f"tensordesc<fp8e4nv[{m}, 128]>",
        "w_desc": f"tensordesc<fp8e4nv[{n}, 128]>",
        "y_desc": f"tensordesc<{dtype}[{m}, {n}]>",
        "x_scale_ptr": "*fp32",
        "w_scale_ptr": "*fp32",
        "tile_group_ptr": "*i32" if grouped else "*fp32",
        "M": "i32",
        "N": "i32",
        "K": "i32",
        "programs": "i32",
    }
    constants = {"BLOCK_M": m, "BLOCK_N": n, "SPLITS": splits, "GROUPED": grouped, "GROUP_M": 8, "TILE": 128}
    name = f"matmul {m}x{splits}x{n} {dtype}{' grouped' if grouped else ''}"
    return Case(name, "megalign.kernels.matmul:matmul_kernel", arguments, constants, warps, stages, DIVISIBLE_MATMUL, fp8_matmul=True)


def wgrad_case(config: wgrad.WgradConfig, dtype: str, accumulate: bool, grouped: bool) -> Case:
    n, k, warps, stages = config
    arguments = {
        "dy_desc": f"tensordesc<fp8e4nv[{n}, 128]>",
        "x_desc": f"tensordesc<fp8e4nv[{k}, 128]>",
        "grad_desc": f"tensordesc<{dtype}[1, {n}, {k}]>",
        "dy_scale_ptr": "*fp32",
        "x_scale_ptr": "*fp32",
        "starts_ptr": "*i32" if grouped else "*fp32",
        "M": "i32",
        "N": "i32",
        "K": "i32",
        "groups": "i32",
        "programs": "i32",
    }
    constants = {"BLOCK_N": n, "BLOCK_K": k, "ACCUMULATE": accumulate, "GROUPED": grouped, "GROUP_N": 8, "TILE": 128}
    name = f"wgrad {n}x{k} {dtype}{' +=' if accumulate else ''}{' grouped' if grouped else ''}"
    return Case(name, "megalign.kernels.wgrad:wgrad_kernel", arguments, constants, warps, stages, DIVISIBLE_WGRAD, fp8_matmul=True)


DIVISIBLE_MATMUL = ("x_scale_ptr", "w_scale_ptr", "tile_group_ptr", "M", "N", "K")
DIVISIBLE_WGRAD = ("dy_scale_ptr", "x_scale_ptr", "starts_ptr", "M", "N", "K")

CASES = [
    *(matmul_case(config, "bf16", False) for config in matmul.CONFIGS),
    matmul_case(matmul.CONFIGS[0], "fp32", False),
    *(matmul_case(config, "bf16", True) for config in matmul.CONFIGS),
    *(wgrad_case(config, "fp32", True, False) for config in wgrad.CONFIGS),
    wgrad_case(wgrad.CONFIGS[0], "bf16", True, False),
    wgrad_case(wgrad.CONFIGS[0], "fp32", False, False),
    *(wgrad_case(config, "fp32", True, True) for config in wgrad.CONFIGS[:2]),
]

"""Compile-ahead cases of kernels/matmul.py and kernels/wgrad.py: every configuration the tuner may choose."""

from __future__ import annotations

from ahead import Case

from megalign.kernels import matmul, wgrad


def case(
    module: str, name: str, grouped: bool, descriptors: dict[str, str], scales: tuple[str, ...], table: str, sizes: tuple[str, ...], constants: dict[str, int], warps: int, stages: int
) -> Case:
    """Scales and the table of groups start on 16 bytes; of the sizes, M, N and K are multiples of 16."""
    arguments = {**descriptors, **dict.fromkeys(scales, "*fp32"), table: "*i32" if grouped else "*fp32", **dict.fromkeys(sizes, "i32")}
    constants = {**constants, "GROUPED": grouped, "TILE": 128}
    divisible = (*scales, table, "M", "N", "K")
    return Case(f"{name}{' grouped' if grouped else ''}", f"megalign.kernels.{module}:{module}_kernel", arguments, constants, warps, stages, divisible, fp8_matmul=True)


def matmul_case(config: matmul.MatmulConfig, dtype: str, grouped: bool) -> Case:
    m, n, splits, warps, stages = config
    descriptors = {"x_desc": f"tensordesc<fp8e4nv[{m}, 128]>", "w_desc": f"tensordesc<fp8e4nv[{n}, 128]>", "y_desc": f"tensordesc<{dtype}[{m}, {n}]>"}
    constants = {"BLOCK_M": m, "BLOCK_N": n, "SPLITS": splits, "GROUP_M": 8}
    scales, sizes = ("x_scale_ptr", "w_scale_ptr"), ("M", "N", "K", "programs")
    return case("matmul", f"matmul {m}x{splits}x{n} {dtype}", grouped, descriptors, scales, "tile_group_ptr", sizes, constants, warps, stages)


def wgrad_case(config: wgrad.WgradConfig, dtype: str, accumulate: bool, grouped: bool) -> Case:
    n, k, warps, stages = config
    descriptors = {"dy_desc": f"tensordesc<fp8e4nv[{n}, 128]>", "x_desc": f"tensordesc<fp8e4nv[{k}, 128]>", "grad_desc": f"tensordesc<{dtype}[1, {n}, {k}]>"}
    constants = {"BLOCK_N": n, "BLOCK_K": k, "ACCUMULATE": accumulate, "GROUP_N": 8}
    scales, sizes = ("dy_scale_ptr", "x_scale_ptr"), ("M", "N", "K", "groups", "programs")
    return case("wgrad", f"wgrad {n}x{k} {dtype}{' +=' if accumulate else ''}", grouped, descriptors, scales, "starts_ptr", sizes, constants, warps, stages)


CASES = [
    *(matmul_case(config, "bf16", False) for config in matmul.CONFIGS),
    matmul_case(matmul.CONFIGS[0], "fp32", False),
    *(matmul_case(config, "bf16", True) for config in matmul.CONFIGS),
    *(wgrad_case(config, "fp32", True, False) for config in wgrad.CONFIGS),
    wgrad_case(wgrad.CONFIGS[0], "bf16", True, False),
    wgrad_case(wgrad.CONFIGS[0], "fp32", False, False),
    *(wgrad_case(config, "bf16", False, False) for config in wgrad.CONFIGS),  # without main gradients, as torch's autograd has it
    *(wgrad_case(config, "fp32", True, True) for config in wgrad.CONFIGS[:2]),
    wgrad_case(wgrad.CONFIGS[0], "bf16", False, True),
]

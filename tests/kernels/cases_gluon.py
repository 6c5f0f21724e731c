"""Compile-ahead cases of kernels/gluon_matmul.py: every configuration the tuner may choose."""

from __future__ import annotations

import torch
from ahead import Case

from megalign.kernels import gluon_matmul as gluon


def case(config: gluon.GluonConfig, dtype: torch.dtype) -> Case:
    half, stages = config
    name = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    arguments = {
        "x_desc": f"tensordesc<fp8e4nv[128, 128],{gluon.OPERAND!r}>",
        "w_desc": f"tensordesc<fp8e4nv[{2 * half}, 128],{gluon.OPERAND!r}>",
        "y_desc": f"tensordesc<{name}[64, {2 * half}],{gluon.RESULTS[dtype]!r}>",
        "x_scale_ptr": "*fp32",
        "w_scale_ptr": "*fp32",
        "M": "i32",
        "N": "i32",
        "K": "i32",
        "programs": "i32",
    }
    constants = {"BLOCK_M": 128, "HALF": half, "TILE": 128, "STAGES": stages}
    divisible = ("x_scale_ptr", "w_scale_ptr", "M", "N", "K")
    return Case(f"gluon matmul 128x2x{half} {name}", "megalign.kernels.gluon_matmul:gluon_matmul_kernel", arguments, constants, 4, 3, divisible, fp8_matmul=True)


CASES = [*(case(config, torch.bfloat16) for config in gluon.CONFIGS), case(gluon.CONFIGS[0], torch.float32)]

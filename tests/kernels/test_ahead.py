"""Every kernel compiles for Hopper as its golden row says, and is the same function that the other tests interpret."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import ahead
import exact_interpreter
import pytest
import triton

KERNELS = ahead.ROOT / "kernels"
OTHER_TRITON = "3.6.0"
PINNED = ("3.7.1", OTHER_TRITON)  # constraints-cpu.txt, and the GPU environment's


def check(table: str, site: Path | None, version: str) -> None:
    result = ahead.compile_cases([table], site)
    assert result["triton"] == version
    cases, golden = ahead.load_cases(table), golden_rows(table, version)
    problems = []
    for case in cases:
        facts = result["cases"][case.name]
        assert facts["source"] == interpreted_source(case), f"{case.name}: the function compiled ahead is not the one that tests interpret"
        problems += [f"{case.name}: {problem}" for problem in ahead.violations(case, facts) + changes(golden.get(case.name, {}), facts)]
    assert not problems, "\n".join([*problems, "meant? python tests/kernels/ahead.py --write"])


def golden_rows(table: str, version: str) -> dict[str, Any]:
    """Rows by case; none for a Triton that is not pinned: there only the rules hold."""
    path = ahead.GOLDEN / f"{table}.triton-{version}.json"
    return json.loads(path.read_text()) if path.exists() or version in PINNED else {}


def changes(golden: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    return [f"{key} was {golden[key]}, is {facts[key]}" for key in golden if golden[key] != facts[key]]


def interpreted_source(case: ahead.Case) -> str:
    module, name = case.kernel.split(":")
    return exact_interpreter.source_of(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("table", ahead.tables())
def test_compiled_ahead(table: str):
    check(table, None, triton.__version__)


@pytest.mark.oracle
@pytest.mark.parametrize("table", ahead.tables())
def test_compiled_ahead_with_the_triton_of_gpu_machines(table: str):
    site = Path(os.environ.get("MEGALIGN_OTHER_TRITON", Path(sys.prefix) / f"triton-{OTHER_TRITON}"))
    assert (site / "triton").is_dir(), f"{site} has no Triton {OTHER_TRITON}: make oracle puts it there"
    check(table, site, OTHER_TRITON)


@pytest.mark.parametrize("version", PINNED)
@pytest.mark.parametrize("table", ahead.tables())
def test_every_case_has_a_golden_row(table: str, version: str):
    assert sorted(golden_rows(table, version)) == sorted(case.name for case in ahead.load_cases(table)), "python tests/kernels/ahead.py --write"


def test_every_kernel_is_compiled_ahead():
    """A kernel is what is launched, `*_kernel`; its helpers are compiled with it."""
    defined = {f"megalign.kernels.{path.stem}:{name}" for path in KERNELS.glob("*.py") for name in kernel_names(path)}
    assert defined and defined == {case.kernel for table in ahead.tables() for case in ahead.load_cases(table)}


def kernel_names(path: Path) -> list[str]:
    lines = path.read_text().splitlines()
    return [line[4:].split("(")[0] for before, line in zip(lines, lines[1:]) if before.endswith(".jit") and "_kernel(" in line]


def test_violations_are_seen():
    case = ahead.Case("x", "m:f", {}, fp8_matmul=True)
    good = {"stack": 0, "local": 0, "shared": 1000, "qgmma": 4, "access": {"TMA.UTMALDG": 2, "LDG.32": 1, "STG.128": 4}}
    assert not ahead.violations(case, good)
    assert "spills" in ahead.violations(case, {**good, "stack": 8})[0]
    assert "spills" in ahead.violations(case, {**good, "local": 2})[0]
    assert "shared memory" in ahead.violations(case, {**good, "shared": 240_000})[0]
    assert "no QGMMA" in ahead.violations(case, {**good, "qgmma": 0})[0]
    assert "global memory" in ahead.violations(case, {**good, "access": {"STG.8": 16, "LDG.128": 2}})[0]
    assert "global memory" in ahead.violations(case, {**good, "access": {"STG.32": 16}})[0]
    assert changes({"registers": 161, "shared": 1}, {"registers": 168, "shared": 1}) == ["registers was 161, is 168"]


def test_machine_code_is_read():
    code = """
        /*0100*/ LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0110*/ @P0 STG.E.U8 desc[UR4][R2.64], R7 ;
        /*0120*/ LDG.E R9, desc[UR4][R2.64] ;
        /*0130*/ UTMALDG.2D [UR8], [UR4] ;
        /*0140*/ LDG.E.64.CONSTANT R9, desc[UR4][R2.64] ;
    """
    assert ahead.accesses(code) == {"LDG.128": 1, "LDG.32": 1, "LDG.64": 1, "STG.8": 1, "TMA.UTMALDG": 1}

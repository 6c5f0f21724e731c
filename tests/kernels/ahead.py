"""Kernels compiled ahead for Hopper (sm_90a) on a machine without a GPU, and what their machine code looks like.

A `Case` is one specialisation of one kernel; `cases_*.py` beside this file list them. `compile_cases` runs this file
as a script in a fresh process (the interpreter is chosen by an environment variable that is read when a kernel is
defined), which compiles each case with Triton's own ptxas and reads registers, stack, shared memory and instructions
from the result. The golden tables, tests/golden/kernels_sm90/, hold these for each Triton version;

    python tests/kernels/ahead.py --write       compile everything, write the table of the Triton that is installed

writes them, and refuses what no kernel may have: spills, local memory, a matmul without the FP8 tensor core.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
GOLDEN = ROOT / "tests" / "golden" / "kernels_sm90"
QGMMA = re.compile(r"QGMMA\.64x\d+x32\.F32\.E4M3\.E4M3")

SHARED_LIMIT = 227 * 1024


@dataclass(frozen=True)
class Case:
    """kernel: "module:function". arguments: Triton type of each argument that is no constexpr, in the kernel's order.

    divisible: arguments that are multiples of 16 (pointers: 16-byte aligned); None: all pointers and integers.
    options: of the compiler, as the launch gives them.
    fp8_matmul: must use the FP8 tensor cores. narrow: may read or write global memory 1 or 2 bytes at a time.
    """

    name: str
    kernel: str
    arguments: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    warps: int = 4
    stages: int = 3  # Triton's default
    divisible: tuple[str, ...] | None = None
    fp8_matmul: bool = False
    narrow: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def load_cases(table: str) -> list[Case]:
    return importlib.import_module(table).CASES


def tables() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("cases_*.py"))


def compile_cases(names: list[str], site: Path | None = None) -> dict[str, dict[str, Any]]:
    """Facts of every case of the tables `names`, by case; `site`: folder with another Triton."""
    path = [str(site)] if site else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*path, str(ROOT), str(FOLDER)]), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, __file__, *names], env=environment, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise AssertionError(f"compile-ahead failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def violations(case: Case, facts: dict[str, Any]) -> list[str]:
    """What no kernel may have, whatever its golden row says."""
    found = []
    if facts["stack"] or facts["local"]:
        found.append(f"spills: {facts['stack']} bytes of stack, {facts['local']} LDL/STL")
    if facts["shared"] > SHARED_LIMIT:
        found.append(f"{facts['shared']} bytes of shared memory; a block on Hopper has {SHARED_LIMIT}")
    if case.fp8_matmul and not facts["qgmma"]:
        found.append("no QGMMA.64x..x32.F32.E4M3.E4M3: the matmul does not run on the FP8 tensor cores")
    wide, narrow = widths(facts["access"])
    if not case.narrow and (narrow or not wide):
        found.append(f"global memory is accessed as {facts['access']}; rows of 16 bytes or TMA only, 4 bytes for scalars")
    return found


def widths(access: dict[str, int]) -> tuple[int, int]:
    """(16-byte and TMA accesses, 1- and 2-byte accesses)."""
    wide = sum(n for kind, n in access.items() if kind.endswith(".128") or kind.startswith("TMA"))
    return wide, sum(n for kind, n in access.items() if kind.endswith((".8", ".16")))


def unlaunched(cases: list[Case], launches: list[Any]) -> list[str]:
    """Cases that equal no recorded launch in kernel, constants, warps, stages and options: compiled ahead, but never run."""
    return [
        case.name
        for case in cases
        if not any(
            (case.kernel, case.constants, case.warps, case.options) == (launch.kernel, launch.constants, launch.warps, launch.options) and launch.stages in (None, case.stages)
            for launch in launches
        )
    ]


# --- in the process that compiles ------------------------------------------------------------------------------------


def compile_case(case: Case) -> dict[str, Any]:
    import triton
    from exact_interpreter import source_of
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = case.kernel.split(":")
    function = getattr(importlib.import_module(module), name)
    order = list(function.arg_names)
    signature = {a: case.arguments[a] if a in case.arguments else "constexpr" for a in order}
    if set(case.arguments) | set(case.constants) != set(order):
        raise ValueError(f"{case.name}: arguments and constants are {sorted({*case.arguments, *case.constants})}, the kernel's are {sorted(order)}")
    if case.divisible is None:
        divisible = [a for a, kind in case.arguments.items() if kind.startswith("*") or kind in ("i32", "i64")]
    else:
        divisible = list(case.divisible)
    attributes: Any = {(order.index(a),): [["tt.divisibility", 16]] for a in divisible}
    source_type = ASTSource
    if type(function).__name__ == "GluonJITFunction":
        from triton.experimental.gluon._runtime import GluonASTSource as source_type
    source = source_type(fn=function, signature=signature, constexprs=dict(case.constants), attrs=attributes)
    options = {"num_warps": case.warps, **case.options} | ({} if source_type is not ASTSource else {"num_stages": case.stages})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return {"source": source_of(function), "shared": compiled.metadata.shared, **machine_code(compiled.asm["cubin"])}


def machine_code(cubin: bytes) -> dict[str, Any]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def ask(what: str) -> str:
            return subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout

        usage, code = ask("-res-usage"), ask("-sass")
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))  # pyright: ignore[reportOptionalSubscript]
    return {
        "registers": registers,
        "stack": stack,
        "local": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "qgmma": len(QGMMA.findall(code)),
        "access": accesses(code),
    }


def accesses(code: str) -> dict[str, int]:
    """Global loads and stores by width in bits; TMA transfers by direction."""
    found: Counter[str] = Counter()
    for kind, suffix in re.findall(r"\b(LDGSTS|LDG|STG|ATOMG|RED)\b((?:\.\w+)*)", code):
        width = re.search(r"\.[US]?(8|16|64|128)\b", suffix)
        found[f"{kind}.{width[1] if width else 32}"] += 1
    for kind in re.findall(r"\b(UTMALDG|UTMASTG|UTMAREDG)", code):
        found[f"TMA.{kind}"] += 1
    return dict(sorted(found.items()))


def main(arguments: list[str]) -> None:
    import triton

    write = "--write" in arguments
    for table in [a for a in arguments if a != "--write"] or tables():
        facts = {}
        for case in load_cases(table):
            facts[case.name] = {"kernel": case.kernel, **compile_case(case)}
            problems = violations(case, facts[case.name])
            if write:
                print(case.name, facts[case.name], *problems, sep="\n    ")
                if problems:
                    sys.exit(f"{case.name} may not be recorded")
        if write:
            rows = {name: {k: row[k] for k in ("registers", "shared", "qgmma", "access")} for name, row in facts.items()}
            GOLDEN.mkdir(parents=True, exist_ok=True)
            path = GOLDEN / f"{table}.triton-{triton.__version__}.json"
            path.write_text("{\n" + ",\n".join(f"  {json.dumps(n)}: {json.dumps(row)}" for n, row in rows.items()) + "\n}\n")
        else:
            print(json.dumps({"triton": triton.__version__, "cases": facts}))


if __name__ == "__main__":
    main(sys.argv[1:])

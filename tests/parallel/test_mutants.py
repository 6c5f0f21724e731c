"""Removing any single hook, flag, refusal, or part of the auditor turns a check red (issue 4). The table: docs/mutations.md."""

from __future__ import annotations

import ast
import importlib
import inspect
from functools import cache
from pathlib import Path

import mutant_checks
import pytest
from ranks import run_ranks
from reduction_mutants import AUDITOR, FLAGS, HOOKS, MUTANTS, REFUSALS, changed_source

CHEAP = ("a copy is compared with itself", "gradients are not compared", "the first step is not looked at", "no step after the first is looked at")
# `make soak` runs the rest.
SHORT = {**FLAGS, **HOOKS, **REFUSALS, **{name: AUDITOR[name] for name in CHEAP}}
LONG = {name: mutant for name, mutant in MUTANTS.items() if name not in SHORT}


@cache
def oracles() -> bytes:
    return run_ranks(mutant_checks.oracles, 1)[0]


@cache
def found(world: int, long: bool) -> dict[str, str]:
    """What the checks say with each mutation."""
    chosen = {name: mutant for name, mutant in MUTANTS.items() if mutant.world == world and (name not in SHORT) == long}
    checks = [mutant.check for mutant in chosen.values()]
    return dict(zip(chosen, run_ranks(mutant_checks.verdicts, world, list(chosen), checks, oracles(), timeout=900)[0], strict=True))


@pytest.mark.parametrize("name", SHORT)
def test_without_this_a_check_is_red(name: str):
    assert found(MUTANTS[name].world, False)[name], "nothing noticed"


@pytest.mark.soak
@pytest.mark.parametrize("name", LONG)
def test_a_broken_auditor_is_noticed(name: str):
    assert found(2, True)[name], "nothing noticed"


@pytest.mark.parametrize("world", [2, 4])
def test_without_a_mutation_all_checks_are_green(world: int):
    checks = sorted({mutant.check for name, mutant in MUTANTS.items() if mutant.world == world and (name in SHORT)})
    assert dict(zip(checks, run_ranks(mutant_checks.verdicts, world, [None] * len(checks), checks, oracles(), timeout=600)[0])) == dict.fromkeys(checks, "")


@pytest.mark.soak
def test_without_a_mutation_the_auditor_is_green():
    checks = sorted({mutant.check for mutant in LONG.values()})
    assert dict(zip(checks, run_ranks(mutant_checks.verdicts, 2, [None] * len(checks), checks, oracles(), timeout=600)[0])) == dict.fromkeys(checks, "")


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutation_changes_what_it_says(name: str):
    compile(changed_source(MUTANTS[name]), name, "exec")


SET_ON_PARAMETERS = {"sequence_parallel", "tensor_model_parallel", "allreduce", "shared", "shared_embedding", "average_gradients_across_tp_domain", "placement"}
SET_ON_OTHERS = {"start_grad_sync", "reset", "no_sync_func", "finalize_model_grads_func"}
MODULES = (
    "parallel.placement", "parallel.reduction", "parallel.optimizer", "parallel.layers", "parallel.attention", "parallel.experts", "parallel.prediction",
    "parallel.lora", "models.build", "models.heads",
)  # fmt: skip
# The line by which user code declares; hooks that move no gradient between ranks.
NOT_MEANT = ("parameter.placement = Declaration(cut, gradients)", "chunk.embedding.register_forward_hook(_with_gradient)")
# Declarations of our own models, said otherwise by a mutation there.
ELSEWHERE = {
    "parallel.lora": ("declare(Parameter(layer.weight.new_empty(shape)), **_lies(layer, factor))",),  # test_lora_layouts.py
    "models.heads": ("self.weight = declare(", "declare(Parameter(torch.empty(size, dtype=dtype)), tensor="),  # test_rm_layouts.py
}


def flags_and_hooks(module: str) -> list[str]:
    """Lines that set a flag by which gradients are reduced or counted, declare a parameter, or hang a hook on something."""
    return flags_and_hooks_of(inspect.getsource(importlib.import_module(f"megalign.{module}")))


def flags_and_hooks_of(source: str) -> list[str]:
    lines = set()
    for node in ast.walk(ast.parse(source)):
        targets = node.targets if isinstance(node, ast.Assign) else []
        named = {t.attr for target in targets for t in ast.walk(target) if isinstance(t, ast.Attribute) and isinstance(t.ctx, ast.Store)}
        hook = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.startswith("register_") and "hook" in node.func.attr
        declares = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "declare"
        if isinstance(node, (ast.Assign, ast.Call)) and (named & (SET_ON_PARAMETERS | SET_ON_OTHERS) or hook or declares):
            lines.add(source.splitlines()[node.lineno - 1].split("  #")[0].strip())
    return sorted(lines)


@pytest.mark.parametrize("module", MODULES)
def test_each_flag_and_each_hook_has_its_mutation(module: str):
    taken_out = [mutant.old for mutant in MUTANTS.values() if mutant.where.startswith(f"megalign.{module}:")]
    left = [line for line in flags_and_hooks(module) if line not in NOT_MEANT and not any(line in old for old in taken_out)]
    elsewhere = ELSEWHERE.get(module, ())
    assert [line for line in left if not any(part in line for part in elsewhere)] == []
    assert all(any(part in line for line in left) for part in elsewhere)


def test_no_other_module_sets_a_flag_or_declares():
    """Of all of ours but the ablation, whose flags are mutations themselves, and what sets them for a copy (the probe)."""
    package = Path(importlib.import_module("megalign").__file__ or "").parent
    files = [path for folder in (package, package.parent / "parallel") for path in folder.rglob("*.py") if not any(p.is_symlink() for p in path.parents)]
    names = {".".join(path.relative_to(package if package in path.parents else package.parent).with_suffix("").parts) for path in files}
    settled = {*MODULES, "parallel.unsynchronised"}
    assert {name for name in names - settled if sets_a_flag(name)} == set()


def sets_a_flag(module: str) -> bool:
    """By its text: a flag of a parameter assigned, a declaration, a function of DDP or the schedule replaced."""
    path = Path(importlib.import_module("megalign").__file__ or "").parents[0].joinpath(*module.split(".")).with_suffix(".py")
    return any(".register_" not in line for line in flags_and_hooks_of(path.read_text()))

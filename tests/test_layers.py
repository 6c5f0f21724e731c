"""Imports go down only: kernels <- parallel <- megalign <- tools, and inside megalign as the architecture says."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megalign"

# A layer may import itself and what stands before it.
LAYERS = [
    ["megalign.kernels"],
    ["megalign.parallel"],
    ["megalign.config", "megalign.batch", "megalign.models.presets"],
    ["megalign.losses"],
    ["megalign.data"],
    ["megalign.models", "megalign.rollout", "megalign.report", "megalign.chat", "megalign.dry_run", "megalign.doctor"],
    ["megalign.rewards"],
    ["megalign.trainer"],
    ["megalign.sft", "megalign.dpo", "megalign.kto", "megalign.best_of_n", "megalign.rso", "megalign.distill", "megalign.sweep", "megalign.rounds", "megalign.implicit", "megalign.rm", "megalign.scoring", "megalign.judges", "megalign.reward_audit", "megalign.audit", "megalign.serving", "megalign.average", "megalign.planner"],
    ["megalign.tools"],
    ["megalign.start", "megalign.cli_data", "megalign.cli", "megalign.__main__"],
]
FORBIDDEN = {
    "megalign.kernels": ("torch.distributed", "megatron"),
    "megalign.losses": ("megatron", "megalign.config", "megalign.parallel", "torch.distributed"),
    "megalign.config": ("torch", "megatron"),
    "megalign.data": ("torch.distributed", "megatron"),
}


def modules() -> Iterator[tuple[str, list[str]]]:
    """(module, what it imports), through the symbolic links, nested imports included."""
    linked = [path for folder in ("kernels", "parallel") for path in sorted((PACKAGE / folder).glob("**/*.py"))]
    for path in sorted(PACKAGE.glob("**/*.py")) + linked:
        name = ".".join(["megalign", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")
        found = []
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        yield name, found


def layer(module: str) -> int:
    """The most specific entry wins: models.presets stands lower than models."""
    matches = [(len(prefix), i) for i, prefixes in enumerate(LAYERS) for prefix in prefixes if under(module, prefix)]
    assert matches, f"{module} belongs to no layer; add it to LAYERS"
    return max(matches)[1]


def under(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


@pytest.mark.parametrize("module, imports", [entry for entry in modules() if entry[0] != "megalign"], ids=lambda v: v if isinstance(v, str) else "")
def test_imports_go_down(module: str, imports: list[str]):
    for name in imports:
        if under(name, "megalign") and name != "megalign":
            assert layer(name) <= layer(module), f"{module} imports {name}, which stands above it"
        assert name.split(".")[0] not in ("parallel", "kernels", "tools", "launch"), f"{module}: say megalign.{name}"
        for prefix, banned in FORBIDDEN.items():
            if under(module, prefix):
                assert not any(under(name, ban) for ban in banned), f"{module} imports {name}"
        if under(name, "megatron.core.parallel_state"):
            assert module == "megalign.parallel.grid"


def test_the_rules_can_fail():
    assert layer("megalign.trainer.loop") > layer("megalign.data.rows") > layer("megalign.parallel.grid")
    assert layer("megalign.models.presets") < layer("megalign.models.build")

"""Kernels broken on purpose: `mutant(module, old, new)` is the module with one piece of its source replaced.

A test hands the mutant to the very check that the sound kernel passes, and asserts that the check fails.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType

_count = itertools.count()


def mutant(module: ModuleType, folder: Path, old: str, new: str) -> ModuleType:
    """`module` with `old`, which must occur exactly once, replaced by `new`; its file is written to `folder`."""
    source = Path(str(module.__file__)).read_text()
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {module.__name__}: the mutation needs another anchor"
    name = f"mutant_{next(_count)}_{module.__name__.rsplit('.', 1)[1]}"
    path = folder / f"{name}.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    changed = importlib.util.module_from_spec(spec)
    sys.modules[name] = changed
    spec.loader.exec_module(changed)
    return changed

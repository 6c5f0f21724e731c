"""Kernels are interpreted, with exact conversions, in every test of this folder."""

from __future__ import annotations

import importlib.util
import os

if importlib.util.find_spec("triton") is None:  # not Linux x86_64: only the torch reference can be tested
    collect_ignore_glob = ["test_[!r]*.py"]
elif os.environ.get("TRITON_INTERPRET") == "1":
    import exact_interpreter

    exact_interpreter.install()

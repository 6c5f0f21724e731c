"""Shared fixtures: real data beside the checkout, and ranks that start fast."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # `from ranks import run_ranks`
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined; make test-gpu sets 0
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a background shell; the runs that tests interrupt would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that read real data can be left out where there is none, by name and not in silence: -m "not data"."""
    for item in items:
        if "shared_data" in getattr(item, "fixturenames", ()):
            item.add_marker("data")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the small public data sets: $MEGALIGN_DATA, or ../shared/data beside the checkout."""
    folder = Path(os.environ.get("MEGALIGN_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.fail(f"{folder} is absent: put the data sets there or set MEGALIGN_DATA (see CONTRIBUTING.md)")
    return folder

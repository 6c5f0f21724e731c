"""`megalign doctor`: green on a sound machine, red where a fault is put in, exit code 1 then."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import mmap
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import doctor_checks
import pytest
from ranks import run_ranks
from rich.console import Console

from megalign.doctor import examine_alone, show
from megalign.doctor.findings import Finding, over_nodes, worst
from megalign.doctor.folder import folder_findings
from megalign.doctor.machine import cores_and_memory, devices, machine_findings, names_and_ports, versions

SOUND = {"python": "3.11.7", "torch": "2.13.0", "megatron-core": "0.16.1", "transformers": "5.23.0"}


def installed(**changes: str | None) -> dict[str, str]:
    """Everything megalign asks for in a version that fits, with changes; None: not installed."""
    import importlib.metadata

    names = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    given = {name.replace("_", "-"): version for name, version in changes.items()}
    return {name: version for name, version in {**names, **SOUND, **given}.items() if version is not None}


def broken(findings: list[Finding]) -> list[str]:
    return [finding.item for finding in findings if finding.verdict == "broken"]


def test_a_sound_machine_is_green(tmp_path: Path):
    findings = machine_findings(local_ranks=1) + folder_findings(tmp_path / "runs", min_free_gb=0.001)
    assert broken(findings) == []
    assert list((tmp_path / "runs").iterdir()) == []  # it cleans up after itself


@pytest.mark.parametrize(
    "change, item",
    [
        ({"python": "3.13.1"}, "python"),
        ({"torch": "2.8.0"}, "torch"),
        ({"torch": "2.14.0"}, "torch"),
        ({"megatron_core": "0.15.0"}, "megatron-core"),
        ({"transformers": None}, "transformers"),
    ],
    ids=str,
)
def test_versions(change: dict[str, Any], item: str):
    assert broken(versions(installed())) == []
    assert broken(versions(installed(**change))) == [item]


def test_the_torch_of_a_container_is_a_prerelease_and_fits():
    assert broken(versions(installed(torch="2.10.0a0+b4e4ee81d3.nv25.12"))) == []


def test_gpus_that_torch_cannot_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert broken(devices(nodes=tmp_path)) == []
    (tmp_path / "nvidia0").touch()
    assert broken(devices(nodes=tmp_path)) == ["CUDA"]


def test_too_many_threads_and_too_little_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    threads, memory = cores_and_memory(64, available=2**30)
    assert threads.verdict == memory.verdict == "warning" and "OMP_NUM_THREADS=1" in threads.fix


def test_a_name_that_does_not_resolve_and_a_loopback_that_is_down(monkeypatch: pytest.MonkeyPatch):
    def no_name(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    def refused(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(socket, "getaddrinfo", no_name)
    monkeypatch.setattr(socket, "create_connection", refused)
    name, port = names_and_ports()
    assert (name.verdict, port.verdict) == ("warning", "broken") and "MASTER_ADDR" in name.fix


def _raise(number: int):
    def call(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return call


FAULTS: dict[str, tuple[Any, str, Any, list[str]]] = {
    "rename refused": (os, "replace", _raise(errno.EXDEV), ["rename"]),
    "rename copies": (os, "rename", lambda old, new: shutil.copytree(old, new), ["rename"]),
    "O_EXCL ignored": (os, "open", lambda path, flags, *more, _open=os.open, **names: _open(path, flags & ~os.O_EXCL, *more, **names), ["O_EXCL"]),
    "no locks": (fcntl, "flock", _raise(errno.ENOSYS), ["flock"]),
    "locks that do not lock": (fcntl, "flock", lambda *_: None, ["flock"]),
    "no maps": (mmap, "mmap", _raise(errno.ENODEV), ["mmap"]),
    "clock of the server": ("time", "time", lambda: 0.0, ["file times"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_system_that_breaks_a_promise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str):
    module, name, replacement, expected = FAULTS[fault]
    if module == "time":
        import time as module
    monkeypatch.setattr(module, name, replacement)
    findings = folder_findings(tmp_path, min_free_gb=0.001)
    monkeypatch.undo()
    assert broken(findings) == expected
    assert all(finding.fix for finding in findings if finding.verdict == "broken")


def test_a_full_disk_and_a_folder_that_cannot_be(tmp_path: Path):
    assert broken(folder_findings(tmp_path, min_free_gb=1e9)) == ["free space"]
    (tmp_path / "file").touch()
    assert broken(folder_findings(tmp_path / "file" / "runs", min_free_gb=0.001)) == ["write"]


def test_nodes_that_differ():
    same = [Finding("machine", "cores", "8")]
    merged = over_nodes({"a": [Finding("versions", "torch", "2.12.0"), *same], "b": [Finding("versions", "torch", "2.13.0"), *same]})
    assert [finding.item for finding in merged] == ["torch on a", "torch on b", "cores"]
    assert broken(merged) == ["torch on a", "torch on b"] and worst(merged) == "broken"


def test_between_ranks(tmp_path: Path):
    """Three ranks, sound and with each fault; every rank says the same."""
    results = run_ranks(doctor_checks.healthy_and_broken, 3, tmp_path)
    assert all([(s, i, verdict) for s, i, _, verdict in rank[fault]] == [(s, i, verdict) for s, i, _, verdict in results[0][fault]] for rank in results for fault in rank)
    bad = {fault: [item for _, item, _, verdict in rows if verdict == "broken"] for fault, rows in results[0].items()}
    assert bad == {
        "none": [],
        "clock 2 s off": [],
        "clock a minute off": ["clocks"],
        "a folder of one node only": ["between ranks"],
        "locks that do not lock": ["flock between ranks"],
        "O_EXCL ignored": ["O_EXCL between ranks"],
        "wrong sums": ["all ranks"],  # of three ranks the last has no neighbour
    }
    assert [item for _, item, _, verdict in results[0]["clock 2 s off"] if verdict == "warning"] == ["clocks"]
    (clock,) = [value for _, item, value, _ in results[0]["clock a minute off"] if item == "clocks"]
    assert clock.startswith("rank 2 is -60")
    assert not list(tmp_path.glob(".megalign*"))


def test_ranks_that_do_not_come_together_are_a_line_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("megalign.parallel.local.launch", lambda *_: 1)
    findings = examine_alone(tmp_path, 2, min_free_gb=0.001)
    assert broken(findings) == ["world"] and "GLOO_SOCKET_IFNAME" in findings[-1].fix
    console = Console(width=200, file=io.StringIO(), record=True)
    show(findings, console)
    assert "1 broken" in console.export_text()


def test_the_command(tmp_path: Path):
    """Bare: a table and exit code 0; a disk that is too small for what is asked: exit code 1."""
    command = [sys.executable, "-m", "megalign", "doctor", str(tmp_path), "--min-free-gb"]
    environment = {**os.environ, "COLUMNS": "200"}
    good = subprocess.run([*command, "0.001"], capture_output=True, text=True, timeout=300, env=environment)
    assert good.returncode == 0, (good.stdout, good.stderr)
    for part in ("versions: megatron-core", "ranks: all ranks", "GB/s", "ranks: clocks", "folder: flock between ranks", "0 broken"):
        assert part in good.stdout, part


def test_inside_torchrun(tmp_path: Path):
    """As a rank: one table, from rank 0, with the machine of every node; red is exit code 1."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "megalign", "doctor", str(tmp_path), "--min-free-gb", "1e9"]
    bad = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "COLUMNS": "200"})
    assert bad.returncode == 1 and bad.stdout.count("megalign doctor") == 1, (bad.stdout, bad.stderr)
    assert "less than 1e+09 GB" in bad.stdout and "1 broken" in bad.stdout and "ranks: all ranks" in bad.stdout


def test_findings_survive_the_way_from_rank_0(tmp_path: Path):
    finding = Finding("ranks", "clocks", "within 0 ms", "ok", "")
    assert Finding(**json.loads(json.dumps(vars(finding)))) == finding

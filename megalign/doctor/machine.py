"""One node by itself: versions, devices, cores and memory, its name and its ports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from megalign.doctor.findings import Finding
from megalign.parallel.init import cpu_cores

OPTIONAL = {"transformer-engine": "fused layers and FP8", "apex": "fused optimizer", "flash-attn": "attention of packed rows on CUDA", "triton": "kernels"}
GIB = 2**30


def machine_findings(*, local_ranks: int) -> list[Finding]:
    """Everything that needs no other node. local_ranks: ranks that will share this machine."""
    return [*versions(), *devices(), *cores_and_memory(local_ranks), *names_and_ports()]


def versions(installed: Mapping[str, str] | None = None) -> list[Finding]:
    """What is installed against what megalign's own metadata asks for. installed: name -> version, default the truth."""
    if installed is None:
        installed = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    python = installed.get("python", platform.python_version())
    supported = Version("3.10") <= Version(python) < Version("3.13")
    findings = [Finding("versions", "python", python, "ok" if supported else "broken", "" if supported else "use Python 3.10, 3.11 or 3.12")]
    try:
        wanted = [Requirement(line) for line in importlib.metadata.requires("megalign") or []]
    except importlib.metadata.PackageNotFoundError:
        return [*findings, Finding("versions", "megalign", "not installed", "broken", "pip install -e . in the source folder")]
    for need in wanted:
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        found = installed.get(need.name.lower().replace("_", "-"))
        fix = f"pip install '{need.name}{need.specifier}'"
        if found is None:
            findings.append(Finding("versions", need.name, "not installed", "broken", fix))
        elif not need.specifier.contains(found, prereleases=True):  # NVIDIA's images carry pre-releases of torch
            findings.append(Finding("versions", need.name, f"{found}, megalign needs {need.specifier}", "broken", fix))
        elif need.name in ("torch", "megatron-core", "transformers"):
            findings.append(Finding("versions", need.name, found))
    extras = [f"{name} {installed[name]}" if name in installed else f"no {name} ({use})" for name, use in OPTIONAL.items()]
    return [*findings, Finding("versions", "optional", "; ".join(extras))]


def devices(*, nodes: Path = Path("/dev")) -> list[Finding]:
    """GPUs, their driver, and whether torch can use what the kernel shows."""
    if not torch.cuda.is_available():
        present = sorted(path.name for path in nodes.glob("nvidia[0-9]*"))
        if present:
            why = "torch is a CPU build" if torch.version.cuda is None else f"torch for CUDA {torch.version.cuda} cannot use the driver"
            return [Finding("devices", "CUDA", f"{len(present)} GPUs in /dev, but {why}", "broken", "install a torch for the driver's CUDA (nvidia-smi shows it), or a newer driver")]
        return [Finding("devices", "CUDA", "none: ranks run on CPU with gloo")]
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    text = ", ".join(sorted({f"{p.name} {p.total_memory / GIB:.0f} GiB" for p in names}))
    findings = [Finding("devices", "CUDA", f"{len(names)} x {text}; torch for CUDA {torch.version.cuda}; driver {_driver()}")]
    for i in range(len(names)):
        free, total = torch.cuda.mem_get_info(i)
        if free < 0.9 * total:
            findings.append(Finding("devices", f"GPU {i}", f"{(total - free) / GIB:.1f} of {total / GIB:.0f} GiB in use", "warning", "another process holds it: nvidia-smi names it"))
    return findings


def cores_and_memory(local_ranks: int, *, available: int | None = None, shared_memory: Path = Path("/dev/shm")) -> list[Finding]:
    """Cores and threads, memory, and the shared memory that NCCL uses inside a node. available: bytes, default the truth."""
    cores, threads = cpu_cores(), int(os.environ.get("OMP_NUM_THREADS") or max(1, cpu_cores() // local_ranks))
    crowded = threads * local_ranks > cores and threads > 1
    findings = [
        Finding(
            "machine",
            "cores",
            f"{cores} usable; {local_ranks} ranks of {threads} threads",
            "warning" if crowded else "ok",
            f"set OMP_NUM_THREADS={max(1, cores // local_ranks)}: more threads than cores slow every rank" if crowded else "",
        )
    ]
    memory = psutil.virtual_memory()
    free = memory.available if available is None else available
    short = free < 1.5 * GIB * local_ranks
    fix = f"{local_ranks} ranks need about 1.5 GiB each before the model" if short else ""
    findings.append(Finding("machine", "memory", f"{free / GIB:.1f} of {memory.total / GIB:.1f} GiB free", "warning" if short else "ok", fix))
    if torch.cuda.is_available() and shared_memory.is_dir():
        size = shutil.disk_usage(shared_memory).total
        small = size < GIB
        findings.append(Finding("machine", str(shared_memory), f"{size / GIB:.2f} GiB", "broken" if small else "ok", "NCCL needs more: docker run --shm-size 16g, or an emptyDir in memory" if small else ""))
    return findings


def names_and_ports() -> list[Finding]:
    """Does the host name resolve, and can a port be opened and reached?"""
    host = socket.gethostname()
    try:
        addresses = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, None)})
        findings = [Finding("machine", "host name", f"{host} is {', '.join(addresses)}")]
    except OSError as error:
        findings = [Finding("machine", "host name", f"{host} does not resolve ({error})", "warning", "ranks on one machine do not need it; on several, add it to DNS or /etc/hosts, or set MASTER_ADDR to an address")]
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
        findings.append(Finding("machine", "local ports", "can be opened and reached"))
    except OSError as error:
        findings.append(Finding("machine", "local ports", f"127.0.0.1 cannot be reached ({error})", "broken", "bring the loopback interface up: ip link set lo up"))
    return findings


def _driver() -> str:
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown (no nvidia-smi)"
    return (done.stdout.split() or ["unknown"])[0]

"""Joining the world: one `init()` for torchrun, SLURM, MPI and a bare process."""

from __future__ import annotations

import datetime
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """Where this process stands among all, and where they meet."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int
    launcher: str  # "torchrun" | "slurm" | "mpi" | "bare"


def read_world(env: Mapping[str, str]) -> World:
    """Read rank, size and meeting point from what the launcher left in the environment.

    torchrun: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. SLURM (inside srun): SLURM_PROCID,
    SLURM_NTASKS, SLURM_LOCALID, SLURM_JOB_NODELIST. MPI: OMPI_COMM_WORLD_* (Open MPI) or PMI_* (MPICH).
    MASTER_ADDR and MASTER_PORT, where set, win over what SLURM and MPI imply.
    """
    address, port = env.get("MASTER_ADDR"), int(env.get("MASTER_PORT", 0))
    if "RANK" in env and "WORLD_SIZE" in env:
        size = int(env["WORLD_SIZE"])
        local = int(env.get("LOCAL_WORLD_SIZE", size))
        return World(int(env["RANK"]), size, int(env.get("LOCAL_RANK", 0)), local, address or "127.0.0.1", port or 29500, "torchrun")
    # In an sbatch or salloc shell SLURM_NTASKS is set as well; only a step started by srun has an id.
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:
        size = int(env["SLURM_NTASKS"])
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "127.0.0.1"
        tasks = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or str(size)
        local = tasks_on_node(tasks, int(env.get("SLURM_NODEID", 0)))
        port = port or 20000 + int(env.get("SLURM_JOB_ID", 0)) % 10000
        return World(int(env["SLURM_PROCID"]), size, int(env["SLURM_LOCALID"]), local, address or first_host(nodes), port, "slurm")
    for prefix, launcher_rank, launcher_size, launcher_local, local_size in (
        ("OMPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        ("PMI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ):
        if launcher_rank in env and launcher_size in env:
            size = int(env[launcher_size])
            local = int(env.get(local_size, size))
            if address is None and local < size:
                raise RuntimeError(
                    f"{prefix} started {size} ranks on several hosts, but MASTER_ADDR is not set; "
                    "pass it: mpirun -x MASTER_ADDR=<host of rank 0> -x MASTER_PORT=29500 ..."
                )
            return World(int(env[launcher_rank]), size, int(env.get(launcher_local, 0)), local, address or "127.0.0.1", port or 29500, "mpi")
    return World(0, 1, 0, 1, "127.0.0.1", 0, "bare")


def tasks_on_node(tasks_per_node: str, node: int) -> int:
    """Tasks of one node in SLURM's short form: node 2 of `8(x2),4` has 4."""
    counts = []
    for part in tasks_per_node.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise RuntimeError(f"SLURM_TASKS_PER_NODE {tasks_per_node!r} is not of the form 8(x2),4")
        counts += [int(match[1])] * int(match[2] or 1)
    if node >= len(counts):
        raise RuntimeError(f"SLURM_NODEID={node}, but SLURM_TASKS_PER_NODE={tasks_per_node} names {len(counts)} nodes")
    return counts[node]


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list: `gpu[03-05,9],cpu1` -> `gpu03`."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodelist)
    if match is None:
        raise RuntimeError(f"SLURM node list {nodelist!r} names no host; set MASTER_ADDR")
    head, number, tail = match.groups()
    return head + (number or "") + (tail or "")


def in_distributed_launch(env: Mapping[str, str] | None = None) -> bool:
    """True when a launcher (torchrun, srun, mpirun) has already started this process as a rank."""
    return read_world(os.environ if env is None else env).launcher != "bare"


def init(timeout_minutes: float = 30.0) -> World:
    """Join the process group (NCCL with CUDA, else gloo), claim a device, and make megatron-core usable.

    Call once a process, before any model is built. On a CPU the cores are shared out among local ranks
    unless OMP_NUM_THREADS says otherwise.
    """
    from megalign.parallel.patches import install

    world = read_world(os.environ)
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(world.local_rank % torch.cuda.device_count())
        elif "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, cpu_cores() // world.local_size))
        # Gloo would ask for the address of the host name, which need not resolve, or not to what others can reach.
        interface = "lo" if world.size == world.local_size else interface_towards(world.address, world.port)
        if interface is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        timeout = datetime.timedelta(minutes=timeout_minutes)
        if world.launcher == "bare":
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)  # pyright: ignore[reportPrivateImportUsage]
        else:
            meeting = f"tcp://{world.address}:{world.port}"
            if world.launcher == "torchrun":
                meeting = "env://"  # torchelastic hosts the store itself
            dist.init_process_group(backend, init_method=meeting, rank=world.rank, world_size=world.size, timeout=timeout)
    install()
    return world


def interface_towards(host: str, port: int) -> str | None:
    """The network interface through which this machine reaches `host` (nothing is sent); None if it is not known."""
    import psutil

    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port or 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            mine = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.split("%")[0] == mine for entry in addresses):
            return name
    return None


def cpu_cores() -> int:
    """Cores this process may use (a container's or taskset's share, not the machine's)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device() -> torch.device:
    """The device of this rank."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def shutdown() -> None:
    """Leave the process group; safe to call twice and without `init()`."""
    if dist.is_initialized():
        from megalign.parallel.grid import forget_grid

        forget_grid()
        dist.destroy_process_group()

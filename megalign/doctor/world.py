"""Between the ranks: do they meet, do collectives give the right sum, how fast, and do their clocks agree?"""

from __future__ import annotations

import json
import os
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalign.doctor import RESULT, no_world, show
from megalign.doctor.findings import Finding, over_nodes, worst
from megalign.doctor.folder import folder_findings, shared_findings
from megalign.doctor.machine import machine_findings
from megalign.parallel.init import World, device, init, read_world, shutdown

SMALL, ROUNDS = 8, 20  # bytes and repetitions for the latency
LARGE_CPU, LARGE_CUDA = 4 * 2**20, 256 * 2**20  # bytes for the bandwidth
SKEW_WARNING, SKEW_BROKEN = 1.0, 30.0  # seconds


def examine_as_rank(folder: Path, *, min_free_gb: float) -> int:
    """Examine the world that a launcher made of this process and others; rank 0 shows; the exit code is that of all."""
    world = read_world(os.environ)
    try:
        init(timeout_minutes=1.0)
    except Exception as error:
        reason = f"rank {world.rank} on {socket.gethostname()} does not meet rank 0 at {world.address}:{world.port} ({str(error).splitlines()[0][:200]})"
        show([no_world(reason)])
        return 1
    findings = world_findings(world, folder)
    local = os.environ.get(RESULT)
    if not local:  # the process that started local ranks has looked at the machine itself
        findings = _of_every_node(world, folder, min_free_gb) + findings
    if world.rank == 0 and local:
        Path(local).write_text(json.dumps([vars(finding) for finding in findings]))
    elif world.rank == 0:
        show(findings)
    shutdown()
    return 0 if local else int(worst(findings) == "broken")


def world_findings(world: World, folder: Path, *, clock: Callable[[], float] = time.time) -> list[Finding]:
    """Collectives by group, clocks, and the folder between ranks (collective; equal on every rank)."""
    hosts: list[Any] = [None] * world.size
    dist.all_gather_object(hosts, socket.gethostname())
    nodes = [list(range(first, min(first + world.local_size, world.size))) for first in range(0, world.size, world.local_size)]
    text = f"{world.size} ranks on {len(nodes)} node{'s' if len(nodes) > 1 else ''} through {world.launcher}, {dist.get_backend()}"
    findings = [Finding("ranks", "world", text)]
    groups = {"all ranks": [list(range(world.size))]}
    if world.size > 2:
        groups["neighbours"] = [[i, i + 1] for i in range(0, world.size - 1, 2)]
    if 1 < len(nodes) < world.size:
        groups |= {"inside a node": nodes, "across nodes": [[node[0] for node in nodes]]}
    for name, members in groups.items():
        findings.append(_collective(name, members, world))
    return [*findings, _clocks(world, clock), *shared_findings(folder, world.rank, world.size, f"rank {world.rank} on {socket.gethostname()}")]


def _collective(name: str, members: list[list[int]], world: World) -> Finding:
    """All-reduce on every group at once, as training does it; the slowest group's numbers."""
    groups: list[Any] = [dist.new_group(ranks) for ranks in members]
    mine = next(((group, ranks) for group, ranks in zip(groups, members, strict=True) if world.rank in ranks), None)
    latency = bandwidth = 0.0
    wrong = None
    if mine is not None and len(mine[1]) > 1:
        group, ranks = mine
        small, large = (torch.empty(size // 4, device=device()) for size in (SMALL, LARGE_CUDA if torch.cuda.is_available() else LARGE_CPU))
        large.fill_(world.rank + 1)
        dist.all_reduce(large, group=group)
        expected = float(sum(rank + 1 for rank in ranks))
        if not bool((large == expected).all()):
            wrong = f"rank {world.rank}: the sum over {ranks} is {large.mean().item()}, expected {expected}"
        latency = _seconds(small, group, ROUNDS)
        # Bus bandwidth of nccl-tests: a ring moves 2 (n - 1) / n of the buffer through every link.
        bandwidth = 2 * (len(ranks) - 1) / len(ranks) * large.nbytes / _seconds(large, group, 5)
    every: list[Any] = [None] * world.size
    dist.all_gather_object(every, (latency, bandwidth, wrong))
    for group in groups:
        if group is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(group)
    if errors := [error for *_, error in every if error]:
        return Finding("ranks", name, errors[0], "broken", "a network card or driver corrupts data: NCCL_DEBUG=INFO; take the node out")
    slowest, narrowest = max(row[0] for row in every), min((row[1] for row in every if row[1]), default=0.0)
    text = f"all-reduce {slowest * 1e6:,.0f} us for {SMALL} bytes, {narrowest / 1e9:.2f} GB/s" if world.size > 1 else "one rank: nothing to reduce"
    slow = torch.cuda.is_available() and world.size > 1 and narrowest < 5e9
    return Finding("ranks", name, text, "warning" if slow else "ok", "NCCL over TCP? NCCL_DEBUG=INFO says; set NCCL_IB_HCA, NCCL_SOCKET_IFNAME" if slow else "")


def _seconds(tensor: torch.Tensor, group: Any, rounds: int) -> float:
    """Median of `rounds` all-reduces."""
    times = []
    for _ in range(rounds):
        _synchronise()
        started = time.perf_counter()
        dist.all_reduce(tensor, group=group)
        _synchronise()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _clocks(world: World, clock: Callable[[], float]) -> Finding:
    """Every rank reads its clock as it leaves a barrier; the median difference to rank 0 over some barriers."""
    offsets: list[list[float]] = []
    for _ in range(7):
        dist.barrier()
        readings: list[Any] = [None] * world.size
        dist.all_gather_object(readings, clock())
        offsets.append([reading - readings[0] for reading in readings])
    skews = [statistics.median(column) for column in zip(*offsets, strict=True)]
    rank = max(range(world.size), key=lambda i: abs(skews[i]))
    skew = abs(skews[rank])
    verdict = "broken" if skew > SKEW_BROKEN else "warning" if skew > SKEW_WARNING else "ok"
    text = f"within {skew * 1e3:.0f} ms" if verdict == "ok" else f"rank {rank} is {skews[rank]:+.1f} s from rank 0"
    return Finding("ranks", "clocks", text, verdict, "" if verdict == "ok" else "run chrony or ntpd on every node")


def _of_every_node(world: World, folder: Path, min_free_gb: float) -> list[Finding]:
    mine = None
    if world.local_rank == 0:
        mine = (socket.gethostname(), machine_findings(local_ranks=world.local_size) + folder_findings(folder, min_free_gb=min_free_gb))
    every: list[Any] = [None] * world.size
    dist.all_gather_object(every, mine)
    # Two nodes may share a name (containers often do): the rank tells them apart.
    return over_nodes({f"{entry[0]} (rank {rank})": entry[1] for rank, entry in enumerate(every) if entry})

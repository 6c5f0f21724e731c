"""`run_ranks(check, world_size)`: a function on every rank of a gloo world, in processes that start fast.

A fork server imports megatron-core once for the whole test session; each rank is a fork of it. `check` must be
importable (a module-level function); its arguments and results are pickled.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

# The fork server ignores this process's sys.path (Python 3.11), and what it cannot import it skips silently.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["ranks_preload"])


def run_ranks(
    check: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240.0, before: Callable[[], Any] | None = None, abandon: bool = False
) -> list[Any]:
    """Call `check(*args)` on each of `world_size` ranks after `init()`; return their results in rank order.

    before: called on each rank before `init()`. abandon: return after the first result; for checks that leave the other
    ranks waiting.

    Raises AssertionError with the traceback of the first rank that failed.
    """
    results = _context.Queue()
    # The meeting point is this process's, as torchrun's agent has it: a port that was free a moment ago may be taken by now.
    meeting = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = meeting.port
    ranks = [_context.Process(target=_rank, args=(check, args, rank, world_size, port, results, before)) for rank in range(world_size)]
    for process in ranks:
        process.start()
    outcomes: dict[int, Any] = {}
    failures: list[tuple[float, int, str]] = []
    deadline = time.time() + timeout
    while len(outcomes) < world_size and time.time() < deadline:
        try:
            rank, when, result, failure = pickle.loads(results.get(timeout=0.5))
        except queue.Empty:
            if failures or any(process.exitcode for process in ranks):
                break
            continue
        outcomes[rank] = result
        if abandon:
            break
        if failure:
            failures.append((when, rank, failure))
    for process in ranks:
        process.join(timeout=10 if not failures and not abandon else 0.5)
        if process.is_alive():
            process.kill()
    if failures:
        _, rank, text = min(failures)
        raise AssertionError(f"rank {rank} of {world_size} failed:\n{text}")
    if abandon and outcomes:
        return list(outcomes.values())
    missing = [(rank, process.exitcode) for rank, process in enumerate(ranks) if rank not in outcomes]
    if missing:
        raise AssertionError(f"ranks without a result (rank, exit code): {missing} after {timeout:.0f} s at most")
    return [outcomes[rank] for rank in range(world_size)]


def _rank(check: Callable[..., Any], args: tuple, rank: int, world_size: int, port: int, results: Any, before: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        OMP_NUM_THREADS="1",
    )
    import torch

    torch.set_num_threads(1)
    from megalign.parallel.init import init, shutdown

    try:
        if before is not None:
            before()
        init()
        result, failure = check(*args), ""
        shutdown()
    except BaseException:
        result, failure = None, traceback.format_exc()
    # Plain pickle: torch's own would pass tensors by handles that die with this process.
    results.put(pickle.dumps((rank, time.time(), result, failure)))
    results.close()
    results.join_thread()
    if failure:
        os._exit(1)

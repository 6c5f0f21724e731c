"""Who hung, by the heartbeats of all ranks; the runs that hang are in tests/end_to_end/test_hang.py."""

from __future__ import annotations

import sys
import threading
from typing import Any

from megalign.parallel.watch import Heartbeat, Position, is_waiting, name_the_hung


def beat(rank: int, *, waiting: bool, stuck: float = 9.0, watched: bool = True, **more: Any) -> Heartbeat:
    values = dict(host=f"h{rank}", pid=rank, pid_namespace="", beat=3, place="x.py:1 in f", position=Position(7, "forward", 5, watched))
    return Heartbeat(rank=rank, waiting=waiting, stuck=stuck, **{**values, **more})


def test_a_heartbeat_survives_its_file_and_a_torn_one_is_none():
    one = beat(2, waiting=True)
    assert Heartbeat.decode(one.encode()) == one and len(one.encode()) == 1024
    assert Heartbeat.decode(one.encode()[:60]) is None and Heartbeat.decode(b"") is None
    long = beat(2, waiting=True, place="/deep" * 400)
    assert len(long.encode()) == 1024 and Heartbeat.decode(long.encode()) is not None


def test_a_silent_rank_is_named_before_a_stuck_one():
    beats = [beat(0, waiting=False), beat(1, waiting=True), beat(2, waiting=True)]
    assert name_the_hung(beats, [2])[0] == 2
    assert name_the_hung([*beats, None], [3]) == (3, "has left no heartbeat")


def test_the_rank_that_does_not_wait_is_named_though_others_stopped_earlier():
    beats = [beat(0, waiting=True, stuck=11), beat(1, waiting=False, stuck=9), beat(2, waiting=True, stuck=12)]
    rank, what = name_the_hung(beats, [])
    assert rank == 1 and "2 of the other 2 ranks wait" in what and "step 7, forward" in what


def test_where_all_wait_the_first_to_stop_is_named():
    assert name_the_hung([beat(0, waiting=True, stuck=8), beat(1, waiting=True, stuck=12)], [])[0] == 1


def test_a_thread_that_waits_is_told_from_one_that_works():
    event, threads = threading.Event(), {}

    def wait() -> None:
        threads["waits"] = threading.get_ident()
        event.wait()

    def work() -> None:
        threads["works"] = threading.get_ident()
        while not event.is_set():
            pass

    started = [threading.Thread(target=target, daemon=True) for target in (wait, work)]
    for thread in started:
        thread.start()
    while len(threads) < 2:
        pass
    frames = sys._current_frames()
    outer = frames[threads["waits"]]
    while outer is not None and outer.f_code.co_name != "wait" or outer is not None and "threading" in outer.f_code.co_filename:
        outer = outer.f_back
    assert is_waiting(outer) and not is_waiting(frames[threads["works"]]) and not is_waiting(None)
    event.set()

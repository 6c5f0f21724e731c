#!/usr/bin/env bash
# Two hosts in two network namespaces, joined by a cable: unshare -rn bash two_hosts.sh COMMAND...
# The command runs on 10.77.0.1; $SECOND_HOST enters 10.77.0.2. Both call their card eth0.
set -euo pipefail
setpriv --pdeathsig KILL unshare -n sleep 600 &
second=$!
ip link set lo up
ip link add eth0 type veth peer name cable
for _ in $(seq 100); do # until the other namespace exists
    [[ $(readlink "/proc/$second/ns/net") != $(readlink /proc/$$/ns/net) ]] && break
    sleep 0.05
done
ip link set cable netns "$second"
export SECOND_HOST="nsenter -t $second -n"
$SECOND_HOST ip link set lo up
$SECOND_HOST ip link set cable name eth0
$SECOND_HOST ip addr add 10.77.0.2/24 dev eth0
$SECOND_HOST ip link set eth0 up
ip addr add 10.77.0.1/24 dev eth0
ip link set eth0 up
exec "$@"

#!/usr/bin/env bash
# Run a command in a Slurm of two nodes, node1 and node2 with two CPUs each, that are this machine.
# Needs root and Debian's slurmctld, slurmd, slurm-client and munge.
#
#     tests/slurm.sh COMMAND ARGUMENTS...
#
# Partition "low" is the default; a job in "high" preempts one there, which has 60 seconds to end
# and is requeued. Nothing outside sees the nodes' names: they are in a mount namespace.
set -euo pipefail
if [ -z "${SLURM_TEST_FOLDER:-}" ]; then
    SLURM_TEST_FOLDER=$(mktemp -d) exec unshare --mount "$0" "$@"
fi
folder=$SLURM_TEST_FOLDER
unset SLURM_TEST_FOLDER

daemons=()
clean_up() {
    scancel --full --signal=KILL --partition=low,high 2>/dev/null || true
    kill "${daemons[@]}" 2>/dev/null || true
    wait
    rm -rf "$folder"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

host=$(hostname -s)
echo "127.0.0.1 localhost node1 node2 $host" >"$folder/hosts"
mount --bind "$folder/hosts" /etc/hosts
chmod 755 "$folder"
mkdir -p "$folder/state" "$folder/spool/node1" "$folder/spool/node2"
head -c 1024 /dev/urandom >"$folder/key"
chmod 400 "$folder/key"
port=$((20000 + $$ % 10000))
cat >"$folder/slurm.conf" <<EOF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=node1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=2
NodeName=node2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=2
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
EOF
export SLURM_CONF=$folder/slurm.conf

munged --foreground --force --key-file="$folder/key" --socket="$folder/munge.socket" \
    --pid-file="$folder/munge.pid" --log-file="$folder/munge.log" --seed-file="$folder/seed" &
daemons+=($!)
slurmctld -D >/dev/null 2>&1 &
daemons+=($!)
for node in node1 node2; do
    slurmd -D -N "$node" >/dev/null 2>&1 &
    daemons+=($!)
done
for _ in $(seq 100); do
    if [ "$(sinfo --noheader --format=%D --states=idle --partition=low 2>/dev/null)" = 2 ]; then
        "$@"
        exit
    fi
    sleep 0.2
done
echo "Slurm has not started:" >&2
tail "$folder"/*.log >&2
exit 1

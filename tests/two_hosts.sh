#!/usr/bin/env bash
# Train on two hosts that are one machine: two network namespaces, joined by a cable, each with a
# hostname and addresses of its own. Needs root, and the launcher on PATH.
#
#     tests/two_hosts.sh pdsh MODULE ARGUMENTS...         one `deepspeed`, which calls pdsh
#     tests/two_hosts.sh deepspeed MODULE ARGUMENTS...    one `deepspeed --no_ssh` on each host
#     tests/two_hosts.sh mpirun MODULE ARGUMENTS...       one `mpirun`, Open MPI's or MPICH's
#     tests/two_hosts.sh torchrun MODULE ARGUMENTS...     one `torchrun` on each host
#     tests/two_hosts.sh srun MODULE ARGUMENTS...         no Slurm, but the variables that it sets
#
# RANKS_PER_HOST is 1 unless it is set.
set -euo pipefail
launcher=${1:?name pdsh, deepspeed, mpirun, torchrun or srun, then a Python module and its arguments}
shift
ranks=${RANKS_PER_HOST:-1}
folder=$(mktemp -d)

clean_up() {
    local host pids
    for host in host0 host1; do
        # Again and again, for a launcher may start one more before it is killed itself.
        while pids=$(ip netns pids "$host-$$" 2>/dev/null) && [ -n "$pids" ]; do
            kill -KILL $pids 2>/dev/null || true
        done
        ip netns del "$host-$$" 2>/dev/null || true
    done
    rm -r "$folder"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

ip netns add "host0-$$"
ip netns add "host1-$$"
ip link add eth0 netns "host0-$$" type veth peer name eth0 netns "host1-$$"
echo "127.0.0.1 localhost" >"$folder/hosts"
for n in 0 1; do
    ip -n "host$n-$$" address add "10.0.0.$((n + 1))/24" dev eth0
    ip -n "host$n-$$" link set eth0 up
    ip -n "host$n-$$" link set lo up
    echo "10.0.0.$((n + 1)) host$n" >>"$folder/hosts"
    echo "host$n slots=$ranks" >>"$folder/hostfile"
done

# `on HOST COMMAND...` is what a shell on that host does. /etc/hosts is covered in a mount
# namespace that `ip netns exec` makes, so nothing outside sees it.
cat >"$folder/on" <<EOF
#!/bin/sh
exec ip netns exec "\$1-$$" unshare --uts sh -c '
    hostname "\$0"
    mount --bind "$folder/hosts" /etc/hosts
    exec "\$@"' "\$@"
EOF
# ssh [OPTIONS] HOST COMMAND..., as launchers call it: the other host's shell gets the words as one
# line, and none of our environment.
cat >"$folder/ssh" <<EOF
#!/bin/sh
while :; do
    case "\$1" in
        -o) shift 2 ;;
        -*) shift ;;
        *) break ;;
    esac
done
host=\$1
shift
exec "$folder/on" "\$host" env -i HOME="\$HOME" PATH=/usr/bin:/bin sh -c "\$*"
EOF
chmod +x "$folder/on" "$folder/ssh"

export PATH="$folder:$PATH"  # for ssh
case $launcher in
    pdsh)
        on host0 deepspeed --hostfile "$folder/hostfile" --module "$@" &
        wait -n
        ;;
    deepspeed)
        for n in 0 1; do
            on "host$n" deepspeed --hostfile "$folder/hostfile" --no_ssh \
                --node_rank "$n" --master_addr 10.0.0.1 --module "$@" &
        done
        wait -n && wait -n
        ;;
    mpirun)
        if mpirun --version | grep -q "Open MPI"; then
            options=(--allow-run-as-root --host "host0:$ranks,host1:$ranks" --prtemca plm_ssh_agent "$folder/ssh"
                --map-by slot:OVERSUBSCRIBE --bind-to none -x DS_ACCELERATOR -x OMP_NUM_THREADS)
        else
            options=(-launcher ssh -hosts host0,host1 -ppn "$ranks")
        fi
        on host0 mpirun "${options[@]}" -n "$((2 * ranks))" "$(command -v python)" -m "$@" &
        wait -n
        ;;
    torchrun)
        for n in 0 1; do
            on "host$n" torchrun --nnodes 2 --node_rank "$n" --nproc_per_node "$ranks" \
                --rdzv_backend c10d --rdzv_endpoint 10.0.0.1:29400 --local_addr "10.0.0.$((n + 1))" \
                -m "$@" &
        done
        wait -n && wait -n
        ;;
    srun)
        for ((rank = 0; rank < 2 * ranks; rank++)); do
            on "host$((rank / ranks))" env MASTER_ADDR=10.0.0.1 SLURM_PROCID="$rank" \
                SLURM_LOCALID=$((rank % ranks)) SLURM_STEP_NUM_TASKS=$((2 * ranks)) python -m "$@" &
        done
        for ((rank = 0; rank < 2 * ranks; rank++)); do wait -n; done
        ;;
    *)
        echo "two_hosts.sh: '$launcher' must be pdsh, deepspeed, mpirun, torchrun or srun" >&2
        exit 2
        ;;
esac

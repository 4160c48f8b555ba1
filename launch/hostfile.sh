#!/usr/bin/env bash
# Pre-train on the hosts of a hostfile by DeepSpeed's own launcher, over pdsh and ssh without
# passwords. Run it on one of them:
#
#     launch/hostfile.sh HOSTFILE ARGUMENTS...
#
# Lines of the file: "node1 slots=8". ARGUMENTS are those of alto_ds.pretrain; without them it
# trains what launch/demo.sh does. All hosts share this folder, .venv included. Without ssh, start
# it on each host with DEEPSPEED_OPTIONS="--no_ssh --node_rank N --master_addr node1".
set -euo pipefail
hostfile=$(realpath "${1:?name the hostfile}")
shift
source "$(dirname "$0")/environment.sh" pretrain
read -ra options <<<"${DEEPSPEED_OPTIONS:-}"

exec deepspeed --hostfile "$hostfile" "${options[@]}" --module alto_ds.pretrain "${demo[@]}" "$@"

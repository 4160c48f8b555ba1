#!/usr/bin/env bash
# Pre-train by torchrun, which starts the ranks again where one is lost: they go on from the last
# checkpoint, also on fewer or more hosts. Run it on each host:
#
#     TORCHRUN_OPTIONS="--nnodes 1:2 --nproc_per_node 8 --rdzv_backend c10d \
#         --rdzv_endpoint node1:29400 --max_restarts 3" launch/torchrun.sh ARGUMENTS...
#
# ARGUMENTS are those of alto_ds.pretrain; without them it trains what launch/demo.sh does, and
# without TORCHRUN_OPTIONS on two ranks of this machine. All hosts share this folder, .venv
# included. torchrun starts again after any other status than 0, also where settings are refused.
set -euo pipefail
source "$(dirname "$0")/environment.sh" pretrain
read -ra options <<<"${TORCHRUN_OPTIONS:---standalone --nproc_per_node 2 --max_restarts 3}"

exec torchrun "${options[@]}" -m alto_ds.pretrain "${demo[@]}" "$@"

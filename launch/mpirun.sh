#!/usr/bin/env bash
# Pre-train on the hosts that an MPI reaches, Open MPI or MPICH; ranks find each other by mpi4py.
#
#     MPIRUN_OPTIONS="-n 16 --host node1:8,node2:8" launch/mpirun.sh ARGUMENTS...    # Open MPI
#     MPIRUN_OPTIONS="-n 16 -hosts node1,node2 -ppn 8" launch/mpirun.sh ARGUMENTS... # MPICH
#
# ARGUMENTS are those of alto_ds.pretrain; without them it trains what launch/demo.sh does, and
# without MPIRUN_OPTIONS on two ranks of this machine. All hosts share this folder, .venv included.
# mpirun must be of the MPI that mpi4py loads; the job says so where it is not.
set -euo pipefail
source "$(dirname "$0")/environment.sh" pretrain
read -ra options <<<"${MPIRUN_OPTIONS:--n 2}"

exec mpirun "${options[@]}" "$(command -v python)" -m alto_ds.pretrain "${demo[@]}" "$@"

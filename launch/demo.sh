#!/usr/bin/env bash
# Pre-train a tiny GPT-2 with ALTO under ZeRO-2 on two ranks, on the text of Python's standard
# library: on two GPUs where there are as many, on one where there is one, else on the CPU.
# Run it again to go on after Ctrl-C. Arguments are passed on to alto_ds.pretrain.
set -euo pipefail
source "$(dirname "$0")/environment.sh" pretrain

ranks=2
if [ "$gpus" -eq 1 ]; then ranks=1; fi  # NCCL takes one rank for each GPU
if [ "$gpus" -eq 0 ]; then export OMP_NUM_THREADS=$((($(nproc) + ranks - 1) / ranks)); fi

exec deepspeed --num_accelerators "$ranks" --module alto_ds.pretrain "${demo[@]}" "$@"

"""How do all ranks find each other, and how do they stop together where one of them fails?"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import deepspeed
import torch.distributed as dist
from deepspeed.comm.comm import mpi_discovery
from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT

from alto_ds.checkpoint.ranks import Ranks

T = TypeVar("T")
PREPARATION_TIMEOUT = timedelta(hours=24)  # of a large text
# What srun tells each process that it starts, and what torch calls it.
SLURM = {
    "SLURM_PROCID": "RANK",
    "SLURM_LOCALID": "LOCAL_RANK",
    "SLURM_STEP_NUM_TASKS": "WORLD_SIZE",
}


class SetupError(RuntimeError):
    """What a user must change, raised on every rank alike."""


def init_distributed(timeout: timedelta) -> None:
    """Join the ranks that ``deepspeed``, ``torchrun``, ``mpirun`` or ``srun`` has started.

    All ranks must call this together. Afterwards ``os.environ`` has RANK, LOCAL_RANK, WORLD_SIZE,
    MASTER_ADDR and MASTER_PORT.

    Args:
        timeout: how long a rank waits for the others, here and in collectives, and to make a
            group with them.

    Raises:
        SetupError: srun without MASTER_ADDR, or mpirun and mpi4py of different MPIs.
    """
    if "RANK" not in os.environ:
        started = _started_by_mpirun()
        if started is not None:
            _ask_mpi(started)
        elif "SLURM_STEP_NUM_TASKS" in os.environ:
            _ask_slurm()
    # DeepSpeed makes groups without naming a timeout, such as that of ZeRO's collectives and
    # ALTO's. PyTorch's own is 30 minutes with gloo, also for ranks that never join a group.
    dist.distributed_c10d.default_pg_timeout = timeout
    dist.distributed_c10d.default_pg_nccl_timeout = timeout
    deepspeed.init_distributed(timeout=timeout)


def _started_by_mpirun() -> int | None:
    """Number of processes by the mpirun that started this one, None where none did."""
    # Slurm's srun may set PMI_SIZE too, but no MPI_LOCALRANKID.
    hydra = "PMI_SIZE" if "MPI_LOCALRANKID" in os.environ else ""  # MPICH, Intel MPI
    size = os.environ.get("OMPI_COMM_WORLD_SIZE", os.environ.get(hydra))
    return None if size is None else int(size)


def _ask_mpi(started: int) -> None:
    mpi_discovery()
    found = int(os.environ["WORLD_SIZE"])
    if found != started:
        # Otherwise each process would be rank 0 of a run of its own, all in one output folder.
        raise SetupError(
            f"mpirun has started {started} processes, and mpi4py finds {found}: they are of "
            "different MPIs. Use the mpirun of the MPI that mpi4py loads, whose name this prints: "
            "python -c 'from mpi4py import MPI; print(MPI.Get_library_version())'"
        )


def _ask_slurm() -> None:
    if "MASTER_ADDR" not in os.environ:
        raise SetupError(
            "MASTER_ADDR is not set, and srun does not tell where rank 0 is. Before srun, write: "
            'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
        )
    os.environ.update({name: os.environ[slurm] for slurm, name in SLURM.items()})
    os.environ.setdefault("MASTER_PORT", str(TORCH_DISTRIBUTED_DEFAULT_PORT))


def on_ranks(here: bool, work: Callable[[], T], patience: timedelta | None = None) -> T | None:
    """Do ``work`` where ``here`` is true and wait for all ranks; raise everywhere if one failed.

    Every rank must call this together. A rank that failed alone would leave the others waiting in
    their next collective.

    Args:
        here: whether this rank works.
        work: what it does.
        patience: how long it may take; by default as long as a collective of training.

    Returns:
        What ``work`` returned, None where ``here`` is false.

    Raises:
        SetupError: with the message of the first rank that failed.
    """
    with Ranks(SetupError, patience) as ranks:
        return ranks.each(lambda: work() if here else None)

"""Are the environment variables in order that launchers and users set?

PyTorch and DeepSpeed read some of them while they are imported, so this is asked before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

# Where one of them is missing, DeepSpeed would take each process for a run of its own.
DISTRIBUTED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class _Number(NamedTuple):
    """What a variable must be, if it is there.

    Attributes:
        lowest: number.
        highest: number.
        meaning: of the number.
    """

    lowest: int
    highest: int
    meaning: str


_ANY = 10**9
NUMBERS = {
    "WORLD_SIZE": _Number(1, _ANY, "the number of ranks"),
    "RANK": _Number(0, _ANY, "the number of this process, from 0 on"),
    "LOCAL_RANK": _Number(0, _ANY, "the number of this process on its node, from 0 on"),
    "MASTER_PORT": _Number(1, 2**16 - 1, "a free port of rank 0's node"),
    "DEEPSPEED_TIMEOUT": _Number(1, 10**7, "the minutes that ranks wait for each other"),
    "OMPI_COMM_WORLD_SIZE": _Number(1, _ANY, "the number of ranks, which mpirun sets"),
    "OMPI_COMM_WORLD_LOCAL_RANK": _Number(0, _ANY, "a number that mpirun sets"),
    "MPI_LOCALRANKID": _Number(0, _ANY, "a number that mpirun sets"),
    "PMI_SIZE": _Number(1, _ANY, "the number of ranks, which mpirun or srun sets"),
    "SLURM_STEP_NUM_TASKS": _Number(1, _ANY, "the number of ranks, which srun sets"),
    "SLURM_PROCID": _Number(0, _ANY, "a number that srun sets"),
    "SLURM_LOCALID": _Number(0, _ANY, "a number that srun sets"),
}
LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")


def problem(variables: Mapping[str, str]) -> str | None:
    """What is wrong with the environment variables, in one line; None where nothing is.

    Args:
        variables: such as ``os.environ``.
    """
    for name, number in NUMBERS.items():
        value = variables.get(name)
        if value is not None and not _is_within(value, number):
            bounds = f"at least {number.lowest}"
            if number.highest != _ANY:
                bounds = f"from {number.lowest} to {number.highest}"
            return (
                f"the environment variable {name}={value!r} must be a whole number, {bounds}: "
                f"{number.meaning}; correct it or unset it"
            )
    threads = variables.get("OMP_NUM_THREADS")
    if threads is not None and not all(
        _is_within(part, _Number(1, _ANY, "")) for part in threads.split(",")
    ):
        return (
            f"the environment variable OMP_NUM_THREADS={threads!r} must be a number of threads, "
            "at least 1; correct it or unset it"
        )
    if "RANK" in variables:
        missing = [name for name in DISTRIBUTED if name not in variables]
        if missing:
            return (
                f"the environment variable RANK is set and {', '.join(missing)} not: start the "
                "run by deepspeed, torchrun, mpirun or srun, which set all of them, or unset RANK"
            )
        rank, count = int(variables["RANK"]), int(variables["WORLD_SIZE"])
        if rank >= count:
            return (
                f"the environment variable RANK={rank} must be below WORLD_SIZE={count}; number "
                "the processes from 0 on"
            )
    return None


def problem_of_accelerator(variables: Mapping[str, str]) -> str | None:
    """Why DS_ACCELERATOR cannot be had, in one line; None where it can, or is not set."""
    name = "DS_ACCELERATOR"
    if name not in variables:
        return None
    remedy = "write cpu, or unset it for what this machine has"
    try:
        from deepspeed.accelerator import get_accelerator

        if get_accelerator().is_available():
            return None
    except Exception as error:  # asserts, and what the packages of accelerators raise
        reason = " ".join(str(error).split()).rstrip(".")
        return f"the environment variable {name}: {reason}; {remedy}"
    return f"the environment variable {name}={variables[name]!r} is not available here; {remedy}"


def is_first_of_node(variables: Mapping[str, str]) -> bool:
    """By what the launchers tell each process that they start."""
    return next((variables[name] for name in LOCAL_RANKS if name in variables), "0") == "0"


def _is_within(value: str, number: _Number) -> bool:
    try:
        return number.lowest <= int(value) <= number.highest
    except ValueError:
        return False

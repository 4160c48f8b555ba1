"""Which process is behind a number, and which launchers has this one? Read from Linux' /proc."""

from __future__ import annotations

import os
from pathlib import Path

# Programs that start ranks and do not end them where they are killed themselves. mpirun and srun
# do, by daemons of their own.
LAUNCHERS = {
    "deepspeed",
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
    "torchrun",
    "torch.distributed.run",
}
NODE_LAUNCHER = "deepspeed.launcher.launch"  # which starts DeepSpeed's ranks of one node


def birth(pid: int) -> str | None:
    """When a process started, in clock ticks since boot, which tells it from a later one.

    Returns:
        None where there is no such process, or one that has ended and was not waited for.
    """
    fields = _stat(pid)
    return None if fields is None or fields[0] in "ZX" else fields[19]


def launchers() -> list[int] | None:
    """Numbers of the launchers of this process that run on this host, the nearest first.

    Returns:
        None where one of DeepSpeed's that there was has ended.
    """
    found: list[int] = []
    words: list[str] = []  # of the farthest
    pid = os.getppid()
    while pid > 0:
        command = _command(pid)
        if _is_launcher(command):
            found.append(pid)
            words = command
        fields = _stat(pid)
        pid = 0 if fields is None else int(fields[1])
    if not found and "CROSS_RANK" in os.environ:
        return None  # only the launcher of a node sets it
    if NODE_LAUNCHER in words and not any(word.startswith("--node_rank=") for word in words):
        return None  # `deepspeed` leaves that out where it has started the launcher by itself
    return found


def _command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return [""]


def _is_launcher(command: list[str]) -> bool:
    names = [Path(word).name for word in command[:4]]  # python -u -m MODULE, python SCRIPT
    return names[0].startswith("python") and not LAUNCHERS.isdisjoint(names)


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the third, the state, on: the second may have spaces."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None

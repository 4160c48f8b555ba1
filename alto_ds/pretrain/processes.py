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


def birth(pid: int) -> str | None:
    """When a process started, in clock ticks since boot, which tells it from a later one.

    Returns:
        None where there is no such process, or one that has ended and was not waited for.
    """
    fields = _stat(pid)
    return None if fields is None or fields[0] in "ZX" else fields[19]


def launchers() -> list[int]:
    """Numbers of the launchers of this process that run on this host, the nearest first."""
    found = []
    pid = os.getppid()
    while pid > 0:
        if _is_launcher(pid):
            found.append(pid)
        fields = _stat(pid)
        pid = 0 if fields is None else int(fields[1])
    return found


def _is_launcher(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")[:4]
    except OSError:
        return False
    names = [Path(word).name for word in words]  # python -u -m MODULE, python SCRIPT
    return names[0].startswith("python") and not LAUNCHERS.isdisjoint(names)


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the third, the state, on: the second may have spaces."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None

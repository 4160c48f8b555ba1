"""Which process is behind a number, and which launchers has this one? Read from Linux' /proc."""

from __future__ import annotations

import os
from pathlib import Path

# Programs that start ranks and do not end them where they are killed themselves. mpirun and srun
# do, by daemons of their own.
NODE_LAUNCHER = "deepspeed.launcher.launch"  # which starts DeepSpeed's ranks of one node
LAUNCHERS = {NODE_LAUNCHER, "torchrun", "torch.distributed.run"}


def birth(pid: int) -> str | None:
    """When a process started, in clock ticks since boot, which tells it from a later one.

    Returns:
        None where there is no such process, or one that has ended and was not waited for.
    """
    fields = _stat(pid)
    return None if fields is None or fields[0] in "ZX" else fields[19]


def launchers() -> list[int] | None:
    """Numbers of the launchers of this process that run on this host, the nearest first.

    A launcher may be inside a program with another name. So beyond the names, DeepSpeed's rank is
    known by its environment, and the `deepspeed` command as the parent of the node's launcher.

    Returns:
        None where one of DeepSpeed's that there was has ended, so that another process has adopted
        what it had started; nothing where there is no /proc to tell.
    """
    nearest, command = _nearest_named()
    if nearest is not None:
        if NODE_LAUNCHER not in command:
            return [nearest]
        # `deepspeed` leaves that word out where it has started the launcher by itself, on one host.
        must_be_there = not any(word.startswith("--node_rank=") for word in command)
        above = _starter(nearest)
    else:
        must_be_there = "CROSS_RANK" in os.environ  # only the launcher of a node sets it
        above = _starter(os.getpid()) if must_be_there else 0
    if above is None and must_be_there:
        return None
    return [pid for pid in (nearest, above) if pid]


def _nearest_named() -> tuple[int | None, list[str]]:
    """The nearest of this process' ancestors with the name of a launcher, and its command."""
    pid = os.getppid()
    while pid:
        command = _command(pid)
        if not LAUNCHERS.isdisjoint(Path(word).name for word in command):
            return pid, command
        pid = _parent(pid)
    return None, []


def _starter(pid: int) -> int | None:
    """The Python that has started a process; 0 where another program has, or /proc does not tell.

    Returns:
        None where the process was adopted: its parent is now that of all orphans. This is number
        1, or a service manager, which has a session of its own.
    """
    parent = _parent(pid)
    if not parent:
        return 0
    is_python = _program(parent) == _program(pid)  # number 1 of a container may be one
    if (parent == 1 and not is_python) or _session(parent) != _session(pid):
        return None
    return parent if is_python else 0


def _parent(pid: int) -> int:
    """0 where it has none here, or /proc does not tell."""
    fields = _stat(pid)
    return 0 if fields is None else int(fields[1])


def _session(pid: int) -> str | None:
    fields = _stat(pid)
    return None if fields is None else fields[3]


def _program(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/exe")
    except OSError:
        return None


def _command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return []


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the third, the state, on: the second may have spaces."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None

"""How is a second run kept out of an output folder, also where hosts share it over NFS?

A file in the folder names the run. Its modification time is a lease: rank 0 renews it, and who
finds the file of another host waits to see whether that still happens. So neither `flock`, which
not every NFS has, nor equal clocks are needed. On the same host it is asked for the process.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import torch.distributed as dist

from alto_ds.pretrain.processes import birth
from alto_ds.pretrain.ranks import PREPARATION_TIMEOUT, on_ranks

FILE = "run.lock"
STALE_SECONDS = 60.0  # a lease that nobody has renewed for so long was left behind
RENEWALS = 6  # in that time


class LockedError(RuntimeError):
    """The folder is another run's."""


@contextmanager
def one_run(folder: Path) -> Iterator[Callable[[Path], None]]:
    """Keep other runs out of the folder, which is made if needed. All ranks must enter together.

    Yields:
        A function that all ranks must call together before they write there, with a folder that
        must be there besides.

    Raises:
        SetupError: on all ranks, here or from that function, where the folder is another run's;
            from that function, where one of the folders is gone.
    """
    lock = RunLock(folder)
    here = dist.get_rank() == 0
    on_ranks(here, lock.acquire, PREPARATION_TIMEOUT)  # it may wait for a lease to end

    def check(needed: Path) -> None:
        on_ranks(here, lambda: lock.check(needed))

    try:
        yield check
    finally:
        if here:
            lock.release()


class RunLock:
    """The lock of one folder. Of one process and no collective.

    Args:
        folder: to be locked.
        stale_seconds: after which a lease that was not renewed counts for nothing.
    """

    def __init__(self, folder: Path, stale_seconds: float = STALE_SECONDS) -> None:
        self._folder = folder
        self._path = folder / FILE
        self._stale_seconds = stale_seconds
        self._ours = b""
        self._ended = threading.Event()

    def acquire(self) -> None:
        """Lock the folder. Waits where a run of another host may have left its lock behind.

        Raises:
            LockedError: a run that goes on has it.
            OSError: the folder cannot be written to.
        """
        self._ours = json.dumps(
            {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "since": datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
                "birth": birth(os.getpid()),
                "place": _place(),
                "token": uuid.uuid4().hex,
            }
        ).encode()
        self._folder.mkdir(parents=True, exist_ok=True)
        while not self._create():
            self._remove_abandoned()
        threading.Thread(target=self._renew, name="renew_lock", daemon=True).start()

    def check(self, *needed: Path) -> None:
        """Make sure that the lock is still ours; one that a user has removed is made again.

        Args:
            needed: folders that must be there, besides the locked one.

        Raises:
            FileNotFoundError: one of the folders is not there any more.
            LockedError: another run has taken it, for this one was silent for too long.
        """
        gone = next((path for path in (self._folder, *needed) if not path.is_dir()), None)
        if gone is not None:
            # Making it again would hide that what was in it is lost, or fill the disk beneath.
            raise FileNotFoundError(
                f"{gone} is gone: it was removed, or its disk is not mounted any more. The steps "
                "since the last checkpoint are lost. Bring it back to go on from there."
            )
        found = _read(self._path)
        if found is None and self._create():
            return
        found = _read(self._path)
        if found is None or found[1] != self._ours:
            raise LockedError(
                f"--output_dir={self._folder} was taken over by {_name(found)} while this run was "
                "silent. This one ends and writes nothing more."
            )

    def release(self) -> None:
        """Remove the lock, if it is still ours."""
        self._ended.set()
        found = _read(self._path)
        if found is not None and found[1] == self._ours:
            self._path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Make the file; False where there is one. Atomic over NFS, too, from version 3 on."""
        try:
            file = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(file, self._ours)
            os.fsync(file)
        except OSError:
            self._path.unlink()
            raise
        finally:
            os.close(file)
        return True

    def _remove_abandoned(self) -> None:
        found = _read(self._path)
        if found is None:
            return
        if not self._is_abandoned(found):
            raise LockedError(
                f"--output_dir={self._folder} is in use by {_name(_read(self._path) or found)}. "
                "Wait until that has ended, or name another folder."
            )
        aside = self._path.with_name(f"{FILE}.{uuid.uuid4().hex}")
        try:
            self._path.rename(aside)
        except FileNotFoundError:
            return
        if aside.read_bytes() == found[1]:
            aside.unlink()
        else:  # another start was quicker, and this is its lock
            aside.rename(self._path)

    def _is_abandoned(self, found: tuple[int, bytes]) -> bool:
        holder = _parse(found[1])
        if holder.get("place") == _place() and holder["birth"] is not None:
            return birth(holder["pid"]) != holder["birth"]
        print(
            f"The lock in {self._folder} is of {_name(found)}: waiting up to "
            f"{self._stale_seconds:g} s to see whether that goes on.",
            file=sys.stderr,
        )
        deadline = time.monotonic() + self._stale_seconds
        while time.monotonic() < deadline:
            time.sleep(self._stale_seconds / RENEWALS / 4)
            now = _read(self._path)
            if now != found:
                return now is None
        return True

    def _renew(self) -> None:
        while not self._ended.wait(self._stale_seconds / RENEWALS):
            with suppress(OSError):  # the next time will tell
                found = _read(self._path)
                if found is not None and found[1] == self._ours:
                    os.utime(self._path)


def _read(path: Path) -> tuple[int, bytes] | None:
    """Modification time in ns and content of a file, None without one.

    It is opened for both, since NFS answers from a cache otherwise.
    """
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns, file.read()
    except FileNotFoundError:
        return None


def _parse(content: bytes) -> dict[str, Any]:
    """What a lock says; nothing where it is damaged, or its run was killed while writing."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    keys = {"host", "pid", "since", "birth", "place"}
    whole = isinstance(found, dict) and keys <= found.keys() and type(found["pid"]) is int
    return found if whole else {}


def _name(found: tuple[int, bytes] | None) -> str:
    holder = {} if found is None else _parse(found[1])
    if not holder:
        return "a run that its lock does not name"
    return f"the run on host {holder['host']}, process {holder['pid']}, since {holder['since']}"


def _place() -> list[str]:
    """Where process numbers mean the same: host, boot and, for containers, namespace."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    return [
        socket.gethostname(),
        boot.read_text().strip() if boot.exists() else "",
        os.readlink(namespace) if namespace.is_symlink() else "",
    ]

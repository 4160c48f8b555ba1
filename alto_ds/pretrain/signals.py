"""How does a run end where a user, a scheduler or the death of its launcher stops it?"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from contextlib import suppress
from types import FrameType

from alto_ds.pretrain.exits import ExitStatus
from alto_ds.pretrain.processes import birth, launchers

# Schedulers warn by SIGTERM or SIGUSR1; a terminal or a connection that closes sends SIGHUP.
STATUS_AFTER = {
    signal.SIGINT: ExitStatus.INTERRUPTED,
    signal.SIGTERM: ExitStatus.REQUEUE,
    signal.SIGUSR1: ExitStatus.REQUEUE,
    signal.SIGHUP: ExitStatus.REQUEUE,
}
WATCH_SECONDS = 1.0  # between two looks at the launchers


class Interruption:
    """Turns signals into an exit status to come, so that the step at hand is finished and saved.

    SIGHUP stays ignored where it is already, as under ``nohup``.

    Attributes:
        status: with which the first of the signals wants the run to end; None before one.
    """

    def __init__(self) -> None:
        self.status: ExitStatus | None = None
        caught = [n for n in STATUS_AFTER if n != signal.SIGHUP or _is_heeded(n)]
        self._before = {number: signal.signal(number, self._request) for number in caught}

    def restore(self) -> None:
        """Let signals do again what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.status is None:
            self.status = STATUS_AFTER[signal.Signals(number)]


def _is_heeded(number: signal.Signals) -> bool:
    return signal.getsignal(number) != signal.SIG_IGN


def watch_launchers() -> None:
    """Send this process a SIGTERM once a launcher of it is gone, in a thread of its own.

    The `deepspeed` command, and the process between it and the ranks, do not take the ranks with
    them where they are killed. On other hosts than the command's only the latter is seen.
    Where one is gone already, such as while this process was importing, it gets the SIGTERM now.
    """
    found = launchers()
    births = {pid: birth(pid) for pid in found or ()}
    if found is None or None in births.values():
        _stop_without_launcher()

    def watch() -> None:
        while all(birth(pid) == born for pid, born in births.items()):
            time.sleep(WATCH_SECONDS)
        _stop_without_launcher()

    if births:
        threading.Thread(target=watch, name="watch_launchers", daemon=True).start()


def _stop_without_launcher() -> None:
    # Each rank says it, for the first to see it ends all.
    rank = os.environ.get("RANK", "?")
    with suppress(OSError):  # the launcher's end may have closed the output
        print(f"alto_ds.pretrain: rank {rank} ends, for its launcher has.", file=sys.stderr)
    os.kill(os.getpid(), signal.SIGTERM)


def drop_lost_output() -> None:
    """Send standard output and error nowhere if the terminal or the reader of a pipe is gone.

    Otherwise the next line printed would end the process before it has saved.
    """
    for file in (1, 2):
        poll = select.poll()
        poll.register(file, 0)  # reports POLLERR and POLLHUP all the same
        if poll.poll(0):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, file)
            os.close(nowhere)

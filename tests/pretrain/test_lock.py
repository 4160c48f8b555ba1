"""One run, one folder: is a second run refused, and none kept out by a lock left behind?"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")

from alto_ds.pretrain.exits import ExitStatus
from alto_ds.pretrain.lock import FILE, LockedError, RunLock
from alto_ds.pretrain.metrics import read_metrics
from tests.launcher import ROOT
from tests.pretrain.forked import Forks
from tests.pretrain.runs import options

HOLD = """
import sys, time
from pathlib import Path
from alto_ds.pretrain.lock import RunLock
RunLock(Path(sys.argv[1]), 1.0).acquire()
print("held", flush=True)
time.sleep(100)
"""


def hold(folder: Path, *before: str) -> subprocess.Popen[str]:
    """A process that holds the lock of a folder, with a lease of 1 second."""
    process = subprocess.Popen(
        [*before, sys.executable, "-c", HOLD, str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_refused_by_name_and_a_killed_one_keeps_none_out(
    tmp_path: Path, forks: Forks
) -> None:
    arguments = options(tmp_path, "output", max_steps=500, eval_interval=1000, save_interval=2)
    metrics = tmp_path / "output/metrics.jsonl"
    first = forks.start(2, *arguments)
    deadline = time.monotonic() + 200
    while len(read_metrics(metrics)) < 4:
        assert time.monotonic() < deadline, first[0].log.read_text()[-3000:]
        time.sleep(0.05)
    holder = json.loads((tmp_path / "output" / FILE).read_text())
    printed = forks.run(2, *arguments, status=ExitStatus.REFUSED)
    assert f"in use by the run on host {socket.gethostname()}, process {first[0].pid}, since " in (
        printed
    )
    assert holder["since"] in printed
    assert "Traceback" not in printed
    for rank in first:
        os.kill(rank.pid, signal.SIGKILL)
    assert forks.wait(first, 20) == [-signal.SIGKILL] * 2
    assert (tmp_path / "output" / FILE).exists()
    again = forks.start(2, *arguments)
    while "Training" not in again[0].log.read_text():
        assert forks.status(again[0]) is None, again[0].log.read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    taken = json.loads((tmp_path / "output" / FILE).read_text())
    assert taken["pid"] == again[0].pid
    for rank in again:
        os.kill(rank.pid, signal.SIGKILL)
    forks.wait(again, 20)


def test_a_lock_is_removed_at_the_end(folder: Path, straight: str) -> None:
    assert not list((folder / "straight").glob(f"{FILE}*"))


def test_a_lock_of_another_host_counts_while_it_is_renewed(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode:
        pytest.skip("no other hostname may be made here")
    rename = ("unshare", "--uts", "sh", "-c", 'hostname elsewhere; exec "$0" "$@"')
    process = hold(tmp_path, *rename)
    lock = RunLock(tmp_path, 1.0)
    with pytest.raises(LockedError, match=f"host elsewhere, process {process.pid}, since "):
        lock.acquire()
    process.kill()
    process.wait()
    began = time.monotonic()
    lock.acquire()
    assert time.monotonic() - began > 0.8  # nothing but silence tells that it has ended
    lock.check()
    lock.release()
    assert not list(tmp_path.iterdir())


def leave_behind(folder: Path) -> None:
    """The lock of a run on this host that was killed."""
    process = subprocess.Popen(["true"])
    dead = RunLock(folder)
    dead.acquire()
    process.wait()
    path = folder / FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pid": process.pid}))
    dead.release()  # not its own any more: only the thread ends


def test_of_many_starts_one_gets_a_lock_that_was_left_behind(tmp_path: Path) -> None:
    for _ in range(20):
        leave_behind(tmp_path)
        locks = [RunLock(tmp_path, 6.0) for _ in range(8)]
        got: list[RunLock] = []

        def start(lock: RunLock, got: list[RunLock] = got) -> None:
            with suppress(LockedError):
                lock.acquire()
                got.append(lock)

        threads = [threading.Thread(target=start, args=(lock,)) for lock in locks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        owners = []
        for lock in got:
            with suppress(LockedError):
                lock.check()
                owners.append(lock)
        assert len(owners) == 1
        owners[0].release()
        assert not list(tmp_path.iterdir())


def test_a_start_that_is_late_does_not_remove_the_lock_of_a_quicker_one(tmp_path: Path) -> None:
    quick = RunLock(tmp_path)

    class Late(RunLock):
        def _is_abandoned(self, found: tuple[int, bytes]) -> bool:
            answer = super()._is_abandoned(found)
            if answer:  # of the lock left behind, which the other replaces now
                quick.acquire()
            return answer

    leave_behind(tmp_path)
    with pytest.raises(LockedError, match=f"in use by .* process {os.getpid()}, since "):
        Late(tmp_path).acquire()
    quick.check()
    quick.release()
    assert not list(tmp_path.iterdir())


def test_a_run_that_was_silent_for_too_long_learns_who_has_its_folder(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.acquire()
    (tmp_path / FILE).unlink()
    lock.check()  # a lock that a user has removed is made again
    (tmp_path / FILE).unlink()
    other = hold(tmp_path)
    with pytest.raises(LockedError, match=f"taken over by .* process {other.pid}, since "):
        lock.check()
    lock.release()
    assert (tmp_path / FILE).exists()  # it is the other's
    other.kill()
    other.wait()


@pytest.mark.parametrize(
    "content",
    [
        b"",  # a run was killed between making the file and writing into it
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b"9" * 5000,
        json.dumps(dict.fromkeys(("host", "pid", "since", "birth", "place"), "\0")).encode(),
    ],
    ids=["empty", "binary", "nested", "huge", "no_pid"],
)
def test_a_lock_that_cannot_be_read_counts_until_it_is_stale(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / FILE).write_bytes(content)
    lock = RunLock(tmp_path, 0.3)
    lock.acquire()
    lock.release()

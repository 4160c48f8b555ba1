"""Signals to one rank, to the launcher alone, and from a terminal that closes."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("deepspeed")

from alto_ds.pretrain import processes
from alto_ds.pretrain.exits import ExitStatus
from alto_ds.pretrain.lock import FILE
from alto_ds.pretrain.metrics import read_metrics
from alto_ds.pretrain.processes import birth
from alto_ds.pretrain.settings import RunSettings
from tests import launcher
from tests.pretrain.forked import Forks
from tests.pretrain.runs import MODULE, options

LONG: dict[str, Any] = {
    "max_steps": 1000,
    "eval_interval": 5000,
    "save_interval": 5000,
    "validation_sequences": 2,
}


def wait_for_steps(folder: Path, steps: int) -> None:
    deadline = time.monotonic() + 200
    while len(read_metrics(folder / "metrics.jsonl")) < steps:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_saved_at_the_last_step(folder: Path, printed: str | None = None) -> int:
    """Returns the number of steps that were done."""
    done = read_metrics(folder / "metrics.jsonl")[-1]["step"]
    assert (folder / "checkpoints/latest").read_text() == f"step{done:07d}"
    assert not (folder / FILE).exists()
    if printed is not None:
        assert f"Stopped after step {done}; the same command goes on from there." in printed
    return done


@pytest.mark.parametrize(
    "signals",
    [
        [(1, signal.SIGUSR1), (1, signal.SIGINT)],
        pytest.param([(0, signal.SIGTERM), (1, signal.SIGHUP)], marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_one_rank_saves_on_all_and_says_whether_to_requeue(
    tmp_path: Path, forks: Forks, signals: list[tuple[int, signal.Signals]]
) -> None:
    """Each start goes on where the one before has stopped, to whichever rank the signal came."""
    arguments = options(tmp_path, "output", **LONG)
    folder = tmp_path / "output"
    done = 0
    for rank, number in signals:
        is_users = number == signal.SIGINT
        status = ExitStatus.INTERRUPTED if is_users else ExitStatus.REQUEUE
        ranks = forks.start(2, *arguments)
        wait_for_steps(folder, done + 3)
        os.kill(ranks[rank].pid, number)
        assert forks.wait(ranks, 60) == [status] * 2
        stopped = assert_saved_at_the_last_step(folder, ranks[0].log.read_text())
        assert stopped >= done + 3
        done = stopped


def test_sighup_stays_ignored_under_nohup() -> None:
    program = (
        "import os, signal; from alto_ds.pretrain.signals import Interruption\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "interruption = Interruption(); os.kill(os.getpid(), signal.SIGHUP)\n"
        "assert interruption.status is None\n"
        "os.kill(os.getpid(), signal.SIGUSR1); os.kill(os.getpid(), signal.SIGINT)\n"
        "assert interruption.status == 75  # the first counts\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=launcher.ROOT)


def ranks_of(pid: int) -> tuple[psutil.Process, list[psutil.Process]]:
    """The process between `deepspeed` and its ranks, and the ranks."""
    (middle,) = psutil.Process(pid).children()
    return middle, middle.children()


def wrapped(ranks: int) -> list[str]:
    """The `deepspeed` command under another name."""
    program = "from deepspeed.launcher.runner import main; main()"
    return [sys.executable, "-W", "ignore", "-c", program, *launcher.deepspeed(ranks)[1:]]


@pytest.mark.parametrize(
    ("whom", "number"),
    [
        ("wrapped command", signal.SIGKILL),
        pytest.param("command", signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param("command", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("command", signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param("middle", signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param("rank", signal.SIGUSR1, marks=pytest.mark.slow),
    ],
)
def test_where_one_process_of_a_launch_gets_a_signal_all_ranks_save_and_end(
    tmp_path: Path, whom: str, number: signal.Signals
) -> None:
    folder = tmp_path / "output"
    arguments = options(tmp_path, "output", **LONG)
    by = wrapped if whom.startswith("wrapped") else launcher.deepspeed
    process = launcher.start(2, "--module", MODULE, *arguments, folder=tmp_path, by=by)
    wait_for_steps(folder, 3)
    middle, ranks = ranks_of(process.pid)
    births = [birth(rank.pid) for rank in ranks]
    assert None not in births
    pids = {"command": process.pid, "middle": middle.pid, "rank": ranks[1].pid}
    os.kill(pids[whom.split()[-1]], number)
    try:
        output, _ = process.communicate(timeout=60)  # until all have closed it
    finally:
        for rank in ranks:  # where the test fails they would train on
            with suppress(psutil.NoSuchProcess):
                rank.kill()
    assert [birth(rank.pid) != born for rank, born in zip(ranks, births, strict=True)] == [True] * 2
    assert_saved_at_the_last_step(folder, output)
    if number == signal.SIGKILL:
        assert re.search(r"alto_ds\.pretrain: rank [01] ends, for its launcher has\.\n", output)
    if whom == "rank":
        assert process.returncode == ExitStatus.REQUEUE  # as `deepspeed` passes it on


NODE = ("deepspeed.launcher.launch", "--world_info=W")
# What its launchers are to a rank; it imports no more than it needs.
RANK = """
import json, os, runpy, sys, time
find = runpy.run_path("alto_ds/pretrain/processes.py")["launchers"]
until = time.monotonic() + float(sys.argv[1])
while (found := find()) is not None and time.monotonic() < until:
    time.sleep(0.02)
print(json.dumps(found))
"""
SUBREAPER = """
import ctypes, os, subprocess, sys
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
subprocess.run(sys.argv[1:], start_new_session=True)
os.wait()
"""


def program(*words: str, ends: bool = False) -> list[str]:
    """The beginning of a command: a Python with these words starts the rest, and prints its pid.

    Args:
        words: in its command line.
        ends: whether it ends then, as one that is killed does; otherwise it waits.
    """
    code = "import os, subprocess, sys; print(os.getpid(), flush=True); "
    code += f"p = subprocess.Popen(sys.argv[{1 + len(words)}:])"
    code += "" if ends else "; p.wait()"
    return [sys.executable, "-W", "ignore", "-X", "utf8", "-c", code, *words]


def found_by(*before: str, seconds: float = 0) -> tuple[list[int], list[int] | None]:
    """The pids of the programs in ``before``, and those that a rank started by it finds.

    The rank waits for so many seconds for one of them to have ended.
    """
    command = [*before, sys.executable, "-c", RANK, str(seconds)]
    environment = os.environ | {"CROSS_RANK": "0"}  # as DeepSpeed sets for ranks
    finished = subprocess.run(
        command,
        env=environment,
        cwd=launcher.ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=60,
        start_new_session=True,
    )
    *pids, found = map(json.loads, finished.stdout.splitlines())
    return pids, found


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ([*program(), *program(*NODE)], 2),
        (["sh", "-c", '"$0" "$@"; true', *program("deepspeed.pt"), *program(*NODE)], 2),
        ([*program("deepspeed"), *program(*NODE), "sh", "-c", '"$0" "$@"; true'], 2),
        ([*program("wrapper.py"), *program("wrapper.py")], 1),  # the node's launcher, too
        (["sh", "-c", '"$0" "$@"; true', *program(*NODE, "--node_rank=1")], 1),
        (["sh", "-c", '"$0" "$@"; true'], 0),  # CROSS_RANK was left over
        ([*program(), *program("-m", "torch.distributed.run")], 1),
    ],
)
def test_launchers_are_found_whatever_their_names(command: list[str], named: int) -> None:
    pids, found = found_by(*command)
    assert found == pids[::-1][:named]


@pytest.mark.parametrize("subreaper", [False, True])
@pytest.mark.parametrize(
    "command",
    [
        [*program(ends=True), *program(*NODE)],
        [*program(), *program(*NODE, ends=True)],
        [*program(), *program("wrapper.py", ends=True)],
    ],
)
def test_a_launcher_that_has_ended_before_is_missed(command: list[str], subreaper: bool) -> None:
    before = [sys.executable, "-c", SUBREAPER] if subreaper else []
    assert found_by(*before, *command, seconds=10)[1] is None


def test_without_proc_no_launcher_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSS_RANK", "0")
    for name in ("_stat", "_program"):
        monkeypatch.setattr(processes, name, lambda pid: None)
    monkeypatch.setattr(processes, "_command", lambda pid: [])
    assert processes.launchers() == []


@pytest.mark.slow
def test_a_terminal_that_closes_ends_a_run_that_has_saved(tmp_path: Path) -> None:
    """Nothing can be printed any more, by any rank."""
    folder = tmp_path / "output"
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2"]
    command += ["--module", MODULE, *options(tmp_path, "output", **LONG)]
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(launcher.ROOT)
        os.execvpe(command[0], command, os.environ | launcher.settings(tmp_path))
    os.set_blocking(terminal, False)
    deadline = time.monotonic() + 200
    while len(read_metrics(folder / "metrics.jsonl")) < 3:
        assert time.monotonic() < deadline
        try:
            os.read(terminal, 100_000)
        except (BlockingIOError, OSError):
            time.sleep(0.02)
    middle, ranks = ranks_of(pid)
    os.close(terminal)
    psutil.wait_procs([middle, *ranks], timeout=60)
    os.waitpid(pid, 0)
    assert_saved_at_the_last_step(folder)


@pytest.mark.slow
def test_where_the_reader_of_the_output_ends_too_a_run_has_saved(tmp_path: Path) -> None:
    """As `deepspeed ... 2>&1 | tee log` does where its connection closes."""
    folder = tmp_path / "output"
    arguments = options(tmp_path, "output", **LONG)
    process = launcher.start(2, "--module", MODULE, *arguments, folder=tmp_path)
    wait_for_steps(folder, 3)
    _, ranks = ranks_of(process.pid)
    assert process.stdout is not None
    process.stdout.close()
    os.killpg(process.pid, signal.SIGHUP)
    _, alive = psutil.wait_procs(ranks, timeout=60)
    process.wait()
    assert not alive
    assert_saved_at_the_last_step(folder)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_save_minutes_that_are_no_time_are_refused(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match=f"--save_minutes={value} must be above 0"):
        RunSettings(output_dir=tmp_path, save_minutes=value)


def test_save_minutes_save_by_the_clock_of_rank_0(tmp_path: Path, forks: Forks) -> None:
    more = LONG | {"max_steps": 3, "save_minutes": 1e-9}
    forks.run(2, *options(tmp_path, "output", **more))
    names = sorted(path.name for path in (tmp_path / "output/checkpoints").glob("step*"))
    assert names == ["step0000002", "step0000003"]  # of all three

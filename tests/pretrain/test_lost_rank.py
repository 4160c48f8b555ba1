"""A rank is lost in mid-step: do the others end, by themselves and in time?"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import launcher
from tests.pretrain.test_run import command

pytest.importorskip("deepspeed")

RANKS = 3
TIMEOUT = 15  # seconds


def time_until(condition: Callable[[], bool], seconds: float) -> float:
    """Wait until ``condition()`` is true and return how long; fail after ``seconds``."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            pytest.fail(f"it has not happened within {seconds} seconds")
        time.sleep(0.1)
    return time.monotonic() - began


@pytest.mark.parametrize("signal", ["SIGKILL", "SIGSTOP"])
def test_where_a_rank_is_lost_the_others_end_in_time(tmp_path: Path, signal: str) -> None:
    """The others see a killed rank's connections close; of a stopped one they hear nothing.

    The ranks are plain processes, for a launcher ends them where one has failed.
    """
    _, *arguments = command(tmp_path, "output", timeout=TIMEOUT)
    config = tmp_path / "zero2.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"train_batch_size": 2 * RANKS}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    logs = [tmp_path / f"{rank}.log" for rank in range(RANKS)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            place |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with log.open("w") as output:
                process = subprocess.Popen(
                    [sys.executable, "tests/scripts/lose_a_rank.py", signal, *arguments],
                    env=os.environ | launcher.settings(tmp_path) | place,
                    cwd=launcher.ROOT,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            processes.append(process)
        first, lost, last = processes
        time_until(lambda: "This rank is lost." in logs[1].read_text(), 200)
        # 15 seconds more for Python to end on a busy machine.
        waited = time_until(lambda: None not in (first.poll(), last.poll()), TIMEOUT + 15)
        assert first.returncode > 0
        assert last.returncode > 0
        assert (lost.poll() is None) is (signal == "SIGSTOP")
    finally:
        for process in processes:
            process.kill()  # also one that is stopped
            process.wait()
    for log in (logs[0], logs[2]):
        text = log.read_text()
        assert "in add_over_ranks" in text  # ALTO's all-reduce is where it waited
        if signal == "SIGSTOP":
            assert waited > TIMEOUT - 5
            assert f"Timed out waiting {TIMEOUT}000ms" in text

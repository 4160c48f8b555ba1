"""Ranks as plain processes, without a launcher and without waiting for their imports.

Imports take most of a short run. ``python -m tests.pretrain.forked`` does them once and forks a
process for each rank. It computes nothing itself, so a forked process is as a new one is after its
imports. Such a process also ends as a new one does, which those of ``multiprocessing`` do not.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from tests.launcher import ROOT, settings

SCRIPT = "examples/pretrain_gpt2.py"
# The second and third are what DeepSpeed and the run import later.
IMPORTS = (
    "alto_ds.pretrain.command",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "matplotlib.pyplot",
)


class Rank(NamedTuple):
    """A process that was started.

    Attributes:
        pid: its number.
        log: file of what it prints.
    """

    pid: int
    log: Path


class Forks:
    """Starts ranks; caches go to ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.pretrain.forked"],
            env=os.environ | settings(folder),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        """End the process that forks, and the ranks that are still there."""
        self._server.communicate(timeout=30)

    def start(self, count: int, *arguments: str, script: str = SCRIPT) -> list[Rank]:
        """Start ``script ARGUMENTS`` on ranks that find each other as those of torchrun do."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        place = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [
            self.start_one(
                place | {"RANK": str(n), "LOCAL_RANK": str(n)}, *arguments, script=script
            )
            for n in range(count)
        ]

    def start_one(self, environment: dict[str, str], *arguments: str, script: str = SCRIPT) -> Rank:
        """Start ``script ARGUMENTS`` with these environment variables besides the others."""
        log = self._folder / f"{time.monotonic_ns()}.log"
        log.touch()
        command = [script, *arguments]
        pid = self._ask({"environment": environment, "command": command, "log": str(log)})
        return Rank(pid, log)

    def status(self, rank: Rank) -> int | None:
        """Exit status of a rank, that of a signal negative; None while it is there."""
        return self._ask(rank.pid)

    def wait(self, ranks: list[Rank], seconds: float) -> list[int]:
        """Wait until all have ended and return their exit statuses."""
        deadline = time.monotonic() + seconds
        found = []
        for rank in ranks:
            while (status := self.status(rank)) is None:
                assert time.monotonic() < deadline, [r.log.read_text()[-3000:] for r in ranks]
                time.sleep(0.05)
            found.append(status)
        return found

    def run(self, count: int, *arguments: str, status: int = 0) -> str:
        """Run the main job to its end; return what rank 0 printed.

        Args:
            count: number of ranks.
            arguments: of the main job.
            status: exit status that each of the ranks must have.
        """
        ranks = self.start(count, *arguments)
        found = self.wait(ranks, 200)
        printed = [rank.log.read_text() for rank in ranks]
        assert found == [status] * count, "\n".join(text[-4000:] for text in printed)
        return printed[0]

    def _ask(self, request: Any) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


def serve() -> None:
    """Answer requests on stdin: start a process and print its number, or print its status.

    At the end of stdin, kill the processes that are still there, such as stopped ones.
    """
    statuses: dict[int, int | None] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if isinstance(request, int):
            if statuses[request] is None:
                pid, status = os.waitpid(request, os.WNOHANG)
                statuses[request] = os.waitstatus_to_exitcode(status) if pid else None
            answer = statuses[request]
        else:
            answer = os.fork()
            if answer == 0:
                _become(**request)
                return  # to the end of this process
            statuses[answer] = None
        print(json.dumps(answer), flush=True)
    for left in [pid for pid, end in statuses.items() if end is None]:
        os.kill(left, signal.SIGKILL)


def _become(environment: dict[str, str], command: list[str], log: str) -> None:
    for number, path, mode in ((0, os.devnull, os.O_RDONLY), (1, log, os.O_WRONLY | os.O_CREAT)):
        file = os.open(path, mode)
        os.dup2(file, number)
        os.close(file)
    os.dup2(1, 2)
    os.environ.update(environment)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    for name in IMPORTS:
        importlib.import_module(name)
    serve()

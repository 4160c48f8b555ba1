"""Commands on real CPU ranks, by the ``deepspeed`` launcher or by ``torchrun``."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parent.parent
CPU = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def settings(folder: Path) -> dict[str, str]:
    """Environment variables of a command on CPU ranks; caches go to ``folder``."""
    return CPU | {
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }


def deepspeed(ranks: int) -> list[str]:
    """The beginning of a command that ``deepspeed`` starts on so many CPU ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(ranks)]
    return [*launcher, "--master_port", str(port)]


def torchrun(ranks: int) -> list[str]:
    """The beginning of a command that ``torchrun`` starts on so many ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc_per_node={ranks}"]


def start(
    ranks: int,
    *command: str,
    folder: Path,
    by: Callable[[int], list[str]] = deepspeed,
    log: IO[str] | int = subprocess.PIPE,
) -> subprocess.Popen[str]:
    """Start ``LAUNCHER COMMAND`` on ``ranks`` CPU ranks; caches go to ``folder``.

    Args:
        ranks: their number.
        command: what the launcher starts, ``--module NAME ARGUMENTS...`` or a script's path.
        folder: for caches.
        by: gives the launcher's command.
        log: what all of them print to.
    """
    return subprocess.Popen(
        [*by(ranks), *command],
        env=os.environ | settings(folder),
        cwd=ROOT,
        stdout=log,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a process group, as a terminal's job has
    )


def run(ranks: int, *command: str, folder: Path, fails: bool = False) -> str:
    """Run a command to its end and return what it printed."""
    process = start(ranks, *command, folder=folder)
    output, _ = process.communicate(timeout=300)
    assert (process.returncode != 0) is fails, output[-8000:]
    return output


def run_cases(ranks: int, module: str, *arguments: str, seconds: float) -> tuple[int, str]:
    """Run a module of cases on ``ranks`` CPU ranks, or GPUs where SHARDING_DEVICE is "cuda".

    Returns:
        The exit status, and the end of what the ranks have printed.
    """
    finished = subprocess.run(
        [*torchrun(ranks), "-m", module, *arguments],
        env=os.environ | (CPU if os.environ.get("SHARDING_DEVICE") != "cuda" else {}),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=seconds,
    )
    return finished.returncode, finished.stdout[-8000:]

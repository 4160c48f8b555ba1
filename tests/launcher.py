"""Commands on real CPU ranks, by the ``deepspeed`` launcher."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def settings(folder: Path) -> dict[str, str]:
    """Environment variables of a command on CPU ranks; caches go to ``folder``."""
    return {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }


def start(ranks: int, *command: str, folder: Path) -> subprocess.Popen[str]:
    """Start ``deepspeed COMMAND`` on ``ranks`` CPU ranks; caches go to ``folder``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(ranks)]
    return subprocess.Popen(
        [*launcher, "--master_port", str(port), *command],
        env=os.environ | settings(folder),
        cwd=ROOT,
        stdout=subprocess.PIPE,
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

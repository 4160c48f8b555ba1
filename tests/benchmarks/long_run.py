"""Does a long run of the main job need ever more memory or file descriptors?

10,000 steps of the tiny model on 2 CPU ranks under ZeRO-2, with a checkpoint every 250 steps and an
evaluation every 1,000.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from tests import launcher
from tests.benchmarks.contenders import arguments, write
from tests.pretrain.runs import MODULE, options

STEPS = 10_000
MARKS = (1_000, 2_000, 5_000, STEPS)


def last_step(metrics: Path) -> int:
    """Number of the last step in a ``metrics.jsonl``; 0 before the first."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 4096))
        lines = file.read().split(b"\n")
    return json.loads(lines[-2])["step"] if len(lines) > 1 else 0


def command(folder: Path) -> list[str]:
    """The main job on one micro batch of short sequences a step."""
    found = options(
        folder,
        "output",
        max_steps=STEPS + 1_000,  # it is ended after the last mark
        seq_length=8,
        eval_interval=1_000,
        save_interval=250,
        validation_sequences=8,
    )
    path = folder / "zero2.json"
    config = json.loads(path.read_text()) | {"train_batch_size": 4}
    config["scheduler"]["params"]["total_num_steps"] = STEPS + 1_000
    path.write_text(json.dumps(config))
    return found


def measure(process: subprocess.Popen[str], metrics: Path) -> list[dict[str, Any]]:
    """What each rank has in use at each of the marks."""
    rows: list[dict[str, Any]] = []
    for mark in MARKS:
        while last_step(metrics) < mark:
            assert process.poll() is None, "the run has ended"
            time.sleep(0.05)
        (middle,) = psutil.Process(process.pid).children()
        for rank, one in enumerate(sorted(middle.children(), key=lambda child: child.pid)):
            rows.append(
                {
                    "rank": rank,
                    "step": last_step(metrics),
                    "resident, MiB": round(one.memory_info().rss / 2**20, 1),
                    "descriptors": one.num_fds(),
                    "threads": one.num_threads(),
                }
            )
            print(rows[-1], flush=True)
    return sorted(rows, key=lambda row: row["rank"])


def main() -> None:
    given = arguments()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with open(folder / "log", "w") as log:
            job = ["--module", MODULE, *command(folder)]
            process = launcher.start(2, *job, folder=folder, log=log)
        try:
            rows = measure(process, folder / "output/metrics.jsonl")
        except BaseException:
            print((folder / "log").read_text()[-3000:])
            raise
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    write(given.report, rows)


if __name__ == "__main__":
    main()

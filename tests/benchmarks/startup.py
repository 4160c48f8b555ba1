"""What a run pays once: import, compilation of the kernel, first step."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from tests.benchmarks.contenders import arguments, ratio, write

FIRST_STEP = (
    "import time, torch, alto_ds; p = torch.nn.Parameter(torch.ones(1000)); p.grad = p.detach();"
    "o = alto_ds.ALTO([p]); t = time.perf_counter(); o.step(); print(time.perf_counter() - t)"
)


def seconds_of(code: str) -> float:
    """Of a new Python that runs ``code``."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def first_step(folder: str) -> float:
    """Seconds of the first step in a new Python, with the compiled kernels in ``folder``."""
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": folder}
    command = [sys.executable, "-c", FIRST_STEP]
    return float(subprocess.check_output(command, env=environment, text=True))


def main() -> None:
    options = arguments()
    codes = {"import torch": "import torch", "import alto_ds": "import alto_ds"}
    times: dict[str, list[float]] = {name: [] for name in codes}
    for _ in range(options.repeats):
        for name, code in codes.items():
            times[name].append(seconds_of(code))
    with tempfile.TemporaryDirectory() as folder:
        compiled = first_step(folder)
        warm = [first_step(folder) for _ in range(3)]
    rows: list[dict[str, Any]] = [
        {
            "what": name,
            "seconds": statistics.median(seconds),
            "of import torch": ratio(seconds, times["import torch"]),
        }
        for name, seconds in times.items()
    ]
    rows.append({"what": "first step ever, compiles the kernel", "seconds": compiled})
    rows.append({"what": "first step of a process", "seconds": statistics.median(warm)})
    write(options.report, rows)


if __name__ == "__main__":
    main()

"""Bytes of state, and of all memory at the peak of a step, for each parameter."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from typing import Any

import psutil
import torch

from tests.benchmarks.contenders import arguments, contenders, gpt2_shapes, make_params, write


def used(device: str) -> int:
    """Bytes in use now."""
    if device == "cpu":
        return int(psutil.Process().memory_info().rss)
    return int(torch.cuda.memory_allocated())


def peak(device: str) -> int:
    """The largest number of bytes in use until now."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(torch.cuda.max_memory_allocated())


def measure(name: str, model: str, device: str) -> dict[str, Any]:
    """One optimizer, in this process, which must be a fresh one."""
    params = make_params(gpt2_shapes(model), device)
    count = sum(param.numel() for param in params)
    make = contenders(device)[name]
    before = used(device)
    optimizer = make(params)
    for _ in range(2):
        optimizer.step()
    states = sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value)
    )
    return {
        "optimizer": name,
        "state, bytes a parameter": states / count,
        "peak, bytes a parameter": (peak(device) - before) / count,
    }


def main() -> None:
    options = arguments()
    rows = []
    for name in contenders(options.device):
        with tempfile.NamedTemporaryFile("r") as file:
            call = f"memory.measure({name!r}, {options.model!r}, {options.device!r})"
            code = f"from tests.benchmarks import memory; memory.write({file.name!r}, [{call}])"
            finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            if finished.returncode:
                reason = finished.stderr.strip().splitlines()[-1]
                rows.append({"optimizer": name, "state, bytes a parameter": reason})
            else:
                rows += json.load(file)
    write(options.report, rows)


if __name__ == "__main__":
    main()

"""Runs a module with DeepSpeed's engine under a stop watch: where does a step's time go?

    python phases.py FILE MODULE ARGUMENTS...

After each step the FILE has the seconds of each phase of rank 0 until then. What one phase calls
another for is the other's alone: a gradient's reduction is no part of the backward pass. Only on
CPUs, where calls return when the work is done. ``throughput`` runs this in any checkout, so it
imports none.
"""

from __future__ import annotations

import collections
import json
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine

COLLECTIVES = (
    *("all_reduce", "reduce", "broadcast", "barrier", "all_gather", "all_gather_object"),
    *("all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor", "all_to_all_single"),
)
OTHER = "data, loss, metrics"
COMMUNICATION = {"backward": "reduction of gradients", "step": "communication of the step"}

spent: dict[str, float] = collections.defaultdict(float)
running = [OTHER]
since = time.perf_counter()


def charge() -> None:
    """Count the time since the last call for the phase that is running."""
    global since
    now = time.perf_counter()
    spent[running[-1]] += now - since
    since = now


def watch(owner: Any, name: str, phase: str | None = None) -> None:
    """Let a function run as a phase; by default as communication of the one that calls it."""
    function = getattr(owner, name)

    def watched(*arguments: Any, **options: Any) -> Any:
        charge()
        running.append(phase or COMMUNICATION.get(running[-1], running[-1]))
        try:
            return function(*arguments, **options)
        finally:
            charge()
            running.pop()

    setattr(owner, name, watched)


def main() -> None:
    file, module = Path(sys.argv[1]), sys.argv[2]
    sys.path[0] = ""  # not the folder of this file, whose modules have names such as "memory"
    for method in ("forward", "backward", "step"):
        watch(DeepSpeedEngine, method, method)
    for name in COLLECTIVES:
        watch(dist, name)
    step = DeepSpeedEngine.step

    def then_write(engine: DeepSpeedEngine, *arguments: Any, **options: Any) -> None:
        steps = engine.global_steps
        step(engine, *arguments, **options)
        if engine.global_steps > steps and dist.get_rank() == 0:
            new = file.with_suffix(".new")
            new.write_text(json.dumps(spent))
            new.replace(file)

    DeepSpeedEngine.step = then_write
    sys.argv = [module, *sys.argv[3:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

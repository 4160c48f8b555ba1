"""How fast does a run train, and what takes the time?"""

from __future__ import annotations

import functools
import resource
from typing import Any, Protocol

import torch
from deepspeed.accelerator import get_accelerator
from torch.profiler import profile, schedule

from alto_ds.pretrain.settings import RunSettings

# Steps after a start in which memory is allocated and, it may be, the model compiled.
WARM_UP = 5
TRACE = "profile.json.gz"
# What devices do at most with matrices in bf16, dense, operations a second: the makers' data.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}


def speed_metrics(tokens: int, flops: float, seconds: float, steps: int) -> dict[str, float]:
    """The speed of one step.

    Args:
        tokens: of all ranks.
        flops: floating-point operations of one rank.
        seconds: that the step took.
        steps: done since the start, this one included.

    Returns:
        ``tokens_per_second``, and after the warm-up ``tflops``, 10^12 operations a second of one
        rank, and their share of the device's peak in ``mfu``, where that is known.
    """
    found = {"tokens_per_second": tokens / seconds}
    if steps > WARM_UP:
        found["tflops"] = flops / seconds / 1e12
        if peak := _peak():
            found["mfu"] = flops / seconds / peak
    return found


def peak_memory() -> int:
    """Bytes that this rank has held at most: of the device's memory, on a CPU of the machine's."""
    if get_accelerator().device_name() == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return get_accelerator().max_memory_allocated()


@functools.cache
def _peak() -> float | None:
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAKS.items() if part in name), None)


class Profiler(Protocol):
    """Is told of each step, and of the last one."""

    def step(self) -> None: ...

    def close(self) -> None: ...


def profiler(run: RunSettings, rank: int) -> Profiler:
    """Records ``run.profile`` steps of rank 0 after the warm-up; on other ranks nothing."""
    return _NoProfiler() if rank or run.profile is None else _Recorder(run, run.profile)


class _NoProfiler:
    def step(self) -> None:
        pass

    def close(self) -> None:
        pass


class _Recorder:
    """Writes a trace and, of the operations that took longest, a table."""

    def __init__(self, run: RunSettings, steps: int) -> None:
        self._folder = run.output_dir
        self._profile = profile(
            schedule=schedule(wait=WARM_UP - 1, warmup=1, active=steps, repeat=1),
            on_trace_ready=self._write,
        )
        self._profile.start()

    def step(self) -> None:
        self._profile.step()

    def close(self) -> None:
        self._profile.stop()

    def _write(self, recorded: Any) -> None:
        recorded.export_chrome_trace(str(self._folder / TRACE))
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = recorded.key_averages().table(sort_by=by, row_limit=40)
        (self._folder / "profile.txt").write_text(table)

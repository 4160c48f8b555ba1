"""Does the host wait for the device in a warm ``ALTO.step()``? By ``torch.profiler``.

    python -m tests.benchmarks.device_waits REPORT.json DEVICE

Between the steps the device multiplies matrices, in place of a model. What a step has found, NaN
or nothing, is read by the next one after an event that is long over, so ``cudaEventSynchronize`` is
allowed; all other waits end with an error.
"""

from __future__ import annotations

import collections
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from alto_ds import ALTO
from tests.benchmarks.contenders import gpt2_shapes, make_params, synchronize

STEPS = 5
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "Memcpy DtoH (Device -> Pageable)")


def main() -> None:
    report, device = sys.argv[1:]
    params = make_params(gpt2_shapes("gpt2" if device == "cuda" else "gpt2-tiny"), device)
    matrix = torch.randn(4096 if device == "cuda" else 64, device=device).diag()
    rows: list[dict[str, Any]] = []
    for state_dtype in ("fp32", "bf16"):
        optimizer = ALTO(params, lr=1e-6, weight_decay=0.01, state_dtype=state_dtype)
        for _ in range(3):
            optimizer.step()
        synchronize(device)
        activities = [ProfilerActivity.CPU]
        activities += [ProfilerActivity.CUDA] if device == "cuda" else []
        with profile(activities=activities) as profiler:
            for _ in range(STEPS):
                _ = matrix @ matrix
                with record_function("ALTO.step"):
                    optimizer.step()
            # The profiler waits for the device at its end, which is no step's.
        rows.append({"states": state_dtype, "steps": STEPS} | waits_of(profiler))
    Path(report).write_text(json.dumps(rows))
    found = [row for row in rows if any(row[name] for name in WAITS)]
    sys.exit(f"the host waited for the device in a warm step: {found}" if found else 0)


def waits_of(profiler: Any) -> dict[str, int]:
    """How often each kind of wait began within a step."""
    events = list(profiler.events())
    spans = [e.time_range for e in events if e.name == "ALTO.step"]
    assert len(spans) >= STEPS
    counts = collections.Counter(
        event.name
        for event in events
        if any(span.start <= event.time_range.start <= span.end for span in spans)
    )
    return {name: counts[name] for name in (*WAITS, "cudaEventSynchronize", "cudaLaunchKernel")}


if __name__ == "__main__":
    main()

"""Time of one step: ALTO, other optimizers, and what only moves the same bytes.

The floor is a copy to memory that is not in the cache, and a negation in place. On most CPUs the
former also reads what it writes to, so it moves more than is counted; the latter does not.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from tests.benchmarks.contenders import (
    StatePool,
    arguments,
    contenders,
    gpt2_shapes,
    make_params,
    ratio,
    take_turns,
    write,
)

# Bytes that must be read and written for each parameter. In pass 2 a layer that is cut is read
# again: 12 more, or 10 with bf16 states. Adam: 28.
BYTES = {
    "ALTO": 36,
    "ALTO, layers cut": 48,
    "ALTO, bf16 states": 28,
    "ALTO, bf16 states, layers cut": 38,
    "LAMB (ALTO, alpha 0)": 28,
    "DeepSpeedCPUAdam": 28,
    "DeepSpeed FusedAdam": 28,
    "torch AdamW, fused": 28,
}
# On GPUs pass 2 reads all layers again.
BYTES_ON_GPU = BYTES | {"ALTO": 48, "ALTO, bf16 states": 38, "LAMB (ALTO, alpha 0)": 40}
PIECE = 2**26  # elements, 256 MiB


def mover(move: Callable[[int], Any], total: int) -> Callable[[], None]:
    """Calls ``move(elements)``, which reads and writes so many, until ``total`` bytes are moved."""

    def run() -> None:
        elements = total // 8
        while elements > 0:
            move(min(elements, PIECE))
            elements -= PIECE

    return run


def main() -> None:
    options = arguments()
    device = options.device
    bytes_of = BYTES if device == "cpu" else BYTES_ON_GPU
    params = make_params(gpt2_shapes(options.model), device)
    count = sum(param.numel() for param in params)
    pool = StatePool()
    actions: dict[str, Callable[[], Any]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, make in contenders(device).items():
        try:
            optimizer = make(params)
            optimizer.step()
        except Exception as error:  # not installed, or cannot be compiled here
            rows[name] = {"optimizer": name, "ms": f"not run: {str(error).splitlines()[0]}"}
            continue
        pool.share(optimizer, params)
        actions[name] = optimizer.step
    source, target = (torch.ones(PIECE, device=device) for _ in range(2))
    floors: dict[str, Callable[[int], Any]] = {
        "copy": lambda elements: target[:elements].copy_(source[:elements]),
        "in place": lambda elements: target[:elements].neg_(),
    }
    for size in sorted(set(bytes_of.values())):
        for floor, move in floors.items():
            actions[f"{size} bytes a parameter, {floor}"] = mover(move, size * count)

    times = take_turns(actions, options.repeats, device)
    adams = ("DeepSpeedCPUAdam", "DeepSpeed FusedAdam", "torch AdamW, fused")
    adam = next(name for name in adams if name in times)
    for name, seconds in times.items():
        rows[name] = {
            "optimizer": name,
            "ms": statistics.median(seconds) * 1e3,
            f"of {adam}": ratio(seconds, times[adam]),
        }
        for floor in floors if name in bytes_of else ():
            moved = times[f"{bytes_of[name]} bytes a parameter, {floor}"]
            rows[name][f"of its bytes, {floor}"] = ratio(seconds, moved)
        if "authors' ALTO" in times:
            rows[name]["authors' ALTO / it"] = ratio(times["authors' ALTO"], seconds)
    write(options.report, list(rows.values()))


if __name__ == "__main__":
    main()

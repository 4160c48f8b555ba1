"""How the cost of a step grows: with parameters, with layers, with ranks.

Layers of one flat tensor, as ZeRO has them, and layers that are tensors of their own, as without
it. Ranks are virtual: the layouts are those of ZeRO-1 on so many ranks, the step is one rank's,
without the collective, which ``collectives`` measures.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from alto_ds import ALTO
from alto_ds.layout import Fragment, Layer, Layout, resolve
from tests.benchmarks.contenders import (
    arguments,
    gpt2_shapes,
    make_params,
    take_turns,
    with_layout,
    write,
)


def flat(lengths: Sequence[int], device: str) -> ALTO:
    """An optimizer whose one tensor holds layers of these lengths."""
    (tensor,) = make_params([(sum(lengths),)], device)
    layers, fragments, offset = [], [], 0
    for index, length in enumerate(lengths):
        layers.append(Layer(tensor, f"layer {index}"))
        fragments.append(Fragment(0, offset, length, 0, index, whole=True))
        offset += length
    return with_layout(ALTO([tensor], lr=1e-6), Layout(tuple(layers), tuple(fragments)))


def separate(lengths: Sequence[int], device: str, make: Callable[..., Any] = ALTO) -> Any:
    """An optimizer of one tensor for each layer."""
    return make(make_params([(length,) for length in lengths], device), lr=1e-6)


class VirtualGroup(NamedTuple):
    """Stands in for a process group, with no processes."""

    rank: int
    size: int


def virtual_rank(ranks: int) -> tuple[ALTO, float]:
    """The middle one of so many ranks under ZeRO-1, GPT-2 345M; seconds to find its layout."""
    lengths = [torch.Size(shape).numel() for shape in gpt2_shapes("gpt2-medium")]
    part = -(-sum(lengths) // ranks)
    buffer = torch.empty(part * ranks, device="meta")
    params: list[Any] = []
    offset = 0
    group = VirtualGroup(ranks // 2, ranks)
    for length in lengths:
        param: Any = nn.Parameter(torch.empty(0, device="meta"))
        param.data = buffer[offset : offset + length]
        param._hp_mapping, param._dp_group = None, group
        params.append(param)
        offset += length
    (tensor,) = make_params([(part,)])
    with (
        mock.patch.object(dist, "get_rank", lambda group: group.rank),
        mock.patch.object(dist, "get_world_size", lambda group: group.size),
    ):
        start = time.perf_counter()
        layout = resolve([tensor], params, dict.fromkeys(params, "layer"))
        seconds = time.perf_counter() - start
    layers = tuple(Layer(layer.param, layer.name) for layer in layout.layers)
    optimizer = with_layout(ALTO([tensor], lr=1e-6), Layout(layers, layout.fragments))
    return optimizer, seconds


def main() -> None:
    options = arguments()
    device, repeats = options.device, options.repeats
    rows: list[dict[str, Any]] = []

    def measure(optimizers: dict[str, Any], elements: dict[str, int]) -> None:
        times = take_turns({n: o.step for n, o in optimizers.items()}, repeats, device)
        for name, seconds in times.items():
            median = statistics.median(seconds)
            nanoseconds = median / elements[name] * 1e9
            rows.append({"step of": name, "ms": median * 1e3, "ns an element": nanoseconds})

    million = 1_000_000
    for count in (1, 3, 10, 30, 100, 350):
        name = f"{count}M parameters in layers of 1M"
        measure({name: flat([million] * count, device)}, {name: count * million})

    layouts = {n: [million // n] * n for n in (1, 10, 100, 1_000, 10_000)}
    optimizers = {f"{n} layers of {million // n}": flat(v, device) for n, v in layouts.items()}
    adamw = functools.partial(torch.optim.AdamW, fused=True)
    for n, lengths in layouts.items():
        optimizers[f"{n} tensors of {million // n}"] = separate(lengths, device)
        name = f"{n} tensors of {million // n}, torch's fused AdamW"
        optimizers[name] = separate(lengths, device, adamw)
    measure(optimizers, dict.fromkeys(optimizers, million))

    for ranks in (8, 64, 512, 4096):
        optimizer, seconds = virtual_rank(ranks)
        name = f"GPT-2 345M on one of {ranks} ranks"
        elements = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        measure({name: optimizer}, {name: elements})
        rows[-1]["layout, ms"] = seconds * 1e3
    write(options.report, rows)


if __name__ == "__main__":
    main()
